"""Images on disk: decoding, folder layouts, the manifest and its validation."""
