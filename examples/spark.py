# SPDX-License-Identifier: Apache-2.0
"""Score a folder with a registered model on Spark: python examples/spark.py MODEL FOLDER OUT.csv.

MODEL is an address like models:/panda-sample-fabric@staging of MLFLOW_TRACKING_URI. It needs pyspark (tried with 4.0)
and Java beside panda-ad, here and on Spark's workers. Scores are those of `panda-ad score`, to the digit.
"""

import csv
import sys

import mlflow
from pyspark.sql import SparkSession
from pyspark.sql.functions import col, struct

RESULT = (
    "score double, p_value double, threshold double, decision string, anomalous boolean, version string, error string"
)

model, folder, out = sys.argv[1:]
# images of a batch are decoded together: 64 of them fit into memory
spark = SparkSession.builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", "64").getOrCreate()
verdict = mlflow.pyfunc.spark_udf(spark, model, env_manager="local", result_type=RESULT)
files = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(folder)
scored = files.select("path", verdict(struct(col("content").alias("image"))).alias("verdict"))
with open(out, "w", newline="", encoding="utf-8") as f:
    rows = csv.writer(f)
    for i, row in enumerate(scored.select("path", "verdict.*").toLocalIterator()):
        if i == 0:
            rows.writerow(row.asDict())
        rows.writerow(row)
