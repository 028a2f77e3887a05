# SPDX-License-Identifier: Apache-2.0
"""Create a bucket in S3 or MinIO where it is not there yet: python deploy/bucket.py NAME."""

import os
import sys

import boto3
from botocore.config import Config


def make_bucket(name: str) -> None:
    """Create the bucket at MLFLOW_S3_ENDPOINT_URL; wait for a server that is just starting."""
    patient = Config(retries={"max_attempts": 10, "mode": "standard"})
    s3 = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"], region_name="us-east-1", config=patient)
    if name not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=name)


if __name__ == "__main__":
    make_bucket(sys.argv[1])
