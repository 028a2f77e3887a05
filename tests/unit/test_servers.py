# SPDX-License-Identifier: Apache-2.0
import socket

import pytest

from panda_ad.commands.servers import running_servers
from panda_ad.errors import UserError


def test_a_taken_port_is_one_line_with_a_command_that_takes_another(tmp_path, monkeypatch):
    """`make ui` takes no options, so that the line names the command that does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as error, running_servers(mlflow_port=port, say=lambda line: None):
            pass
    assert f"port {port} " in str(error.value) and "\n" not in str(error.value)
    assert "`.venv/bin/panda-ad ui --mlflow-port 0`" in str(error.value)
    assert not (tmp_path / ".prefect/ui.json").exists(), "the lock is free again"
