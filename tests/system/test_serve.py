# SPDX-License-Identifier: Apache-2.0
"""A published model as `mlflow models serve` runs it: the same numbers as the detector's, from the files that travel with it."""

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from monitor_project import make_monitored
from registry_project import make_project, read_rows, set_gate, write_rows

from panda_ad.errors import UserError
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.registry.new_threshold import set_threshold
from panda_ad.registry.promote import promote
from panda_ad.registry.versions import download_version
from panda_ad.scoring.bundle import load_bundle
from panda_ad.stages.publish import main as publish
from panda_ad.system.processes import Group

MODEL = "models:/panda-sample-fabric@staging"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository whose model was built by the real stages and stands @staging."""
    from panda_ad.stages import adapt, evaluate, extract, index

    folder = make_project(tmp_path_factory.mktemp("serve") / "plant")
    for name in ("adapt", "bundle", "evaluation"):
        shutil.rmtree(folder / "build" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"]["method"] = "none"
    params["gate"] |= {"min_image_auroc": None, "min_pixel_auroc": None, "max_latency_ms": 60000.0}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        extract.main()
        for stage in (adapt, index, evaluate):
            stage.main("fabric")
        publish("fabric")
        (decision,) = promote()
        assert {"latency", "calibration holds"} <= {r.name for r in decision.rules}
        yield folder


def evaluated(folder):
    """(bytes, score, whether anomalous) of the test images, as the stage `evaluate` has them."""
    rows = read_rows(folder / "build/evaluation/fabric/scores.csv")
    return [((folder / "data" / r["path"]).read_bytes(), float(r["score"]), r["anomalous"] == "True") for r in rows]


def test_the_bundle_in_the_registry_gives_the_evaluated_scores(project):
    from panda_ad.data.images import decode

    cases = evaluated(project)
    verdicts = load_bundle(download_version(MODEL)[2]).score([decode(data, "x") for data, _, _ in cases])
    assert [v.score for v in verdicts] == [score for _, score, _ in cases]


def test_a_changed_test_set_is_scored_by_the_incumbent_itself(project, tmp_path, monkeypatch):
    from panda_ad.stages import evaluate, index

    folder = tmp_path / "plant"
    shutil.copytree(project, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for path in (folder / "build/validation/manifest.csv", folder / "build/features/fabric/rows.csv"):
        rows = read_rows(path)
        rows[14]["split"] = "train"  # one good test image less
        write_rows(path, rows)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["gallery"]["k"] = 1
    params["gate"] |= {"margin": 1.0, "recall_margin": 1.0, "decision_margin": 1.0}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    index.main("fabric")
    evaluate.main("fabric")
    publish("fabric")
    assert len(evaluated(folder)) == len(evaluated(project)) - 1

    image = folder / "data" / read_rows(folder / "build/evaluation/fabric/scores.csv")[0]["path"]
    kept = image.read_bytes()
    image.write_bytes(evaluated(project)[5][0])
    with pytest.raises(UserError, match="not the image that was evaluated"):
        promote()
    image.write_bytes(kept)

    (decision,) = promote()
    assert (decision.outcome, decision.incumbent) == ("promoted", "1")
    (rule,) = [r for r in decision.rules if r.name == "image AUROC not worse"]
    table = read_rows(project / "build/evaluation/fabric/scores.csv")[1:]
    theirs = auroc(np.array([int(r["label"]) for r in table]), np.array([float(r["score"]) for r in table]))
    assert f"against {theirs:.4f}" in rule.text


def test_few_large_images_are_decoded_at_a_time_and_the_verdicts_stay_the_same(project, monkeypatch):
    """Over REST, on the command line and in the gate. Three images of the test set stand for 64 megapixels."""
    import pandas as pd

    from panda_ad.commands import score
    from panda_ad.data import images
    from panda_ad.params_file import load_params
    from panda_ad.registry.evidence import rescore, score_table
    from panda_ad.registry.model import PandaModel
    from panda_ad.scoring.detector import Detector

    monkeypatch.chdir(project)
    served, bundle = PandaModel(), project / "build/bundle/fabric"
    served.version = ""
    served.detector = load_bundle(bundle)
    rows = score_table((project / "build/evaluation/fabric/scores.csv").read_bytes())
    files = [project / "data" / path for path in rows["path"]]
    table = pd.DataFrame({"image": [file.read_bytes() for file in files]})

    def everything():
        verdicts = [j.verdict for j in score.verdicts(served.detector, files)]
        return (
            served.predict(None, table, {"heatmap": True}),
            verdicts,
            rescore(bundle, load_params(), rows)["score"].tolist(),
        )

    sizes, real = [], Detector.score
    monkeypatch.setattr(
        Detector,
        "score",
        lambda self, images, *args, **more: sizes.append(len(images)) or real(self, images, *args, **more),
    )
    whole = everything()
    assert sizes == [22] * 3
    sizes.clear()
    monkeypatch.setattr(images, "BATCH_PIXELS", 3 * 32 * 32)
    few = everything()
    assert max(sizes) == 3 and sum(sizes) == 3 * 22
    pd.testing.assert_frame_equal(few[0], whole[0], check_exact=True)
    assert few[1:] == whole[1:] and whole[2] == rows["score"].tolist()


@pytest.mark.slow
def test_the_logged_model_works_without_the_repository_and_says_what_its_signature_says(project, tmp_path):
    """In a process that cannot import this checkout; the input example goes through, as MLflow would check when logging."""
    code = f"""
import json, sys
sys.path = [p for p in sys.path if not p.rstrip('/').endswith('src')]
sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]
import mlflow
model = mlflow.pyfunc.load_model("{MODEL}")
import pandas as pd
table = model.predict(model.input_example)
heat = model.predict(model.input_example, params={{"heatmap": True}})
import panda_ad
print(json.dumps({{
    "columns": list(table.columns), "schema": model.metadata.get_output_schema().input_names(), "heat": len(heat["heatmap"][0]),
    "package": panda_ad.__file__, "types": [str(t) for t in table.dtypes],
}}))
"""
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    columns = ["score", "p_value", "threshold", "decision", "anomalous", "version", "error"]
    assert said["columns"] == said["schema"] == columns
    assert said["types"][:3] == ["float64"] * 3 and said["types"][4] == "bool"
    assert said["heat"] > 50 and "/code/panda_ad/" in said["package"]


@contextlib.contextmanager
def serving(project, tmp_path, command):
    """The address of a server of the model @staging."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    bin_folder = os.path.dirname(sys.executable)
    env = {
        **os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1", "PATH": bin_folder + os.pathsep + os.environ["PATH"],
    }  # fmt: skip
    address, log = f"http://127.0.0.1:{port}", tmp_path / "serve.log"
    arguments = [sys.executable, "-m", *command, str(port)]
    with open(log, "wb") as output, Group(arguments, env=env, cwd=tmp_path, output=output) as server:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except OSError:
                assert server.running and time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        yield address


MLFLOW = ["mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local", "-h", "127.0.0.1", "-p"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["panda_ad.cli", "serve", MODEL, "--port"], MLFLOW], ids=["panda-ad", "mlflow"])
def test_rest_answers_base64_images_with_the_evaluated_scores(project, tmp_path, command):
    with serving(project, tmp_path, command) as address:
        cases = evaluated(project)
        rows = ask(address, [data for data, _, _ in cases])
        assert [r["score"] for r in rows] == [score for _, score, _ in cases]
        assert [(r["anomalous"], r["decision"]) for r in rows] == [(a, "defect" if a else "good") for _, _, a in cases]
        assert all(0 < r["p_value"] <= 1 for r in rows)
        limit = json.loads((project / "build/evaluation/fabric/metrics.json").read_text())["threshold"]
        assert {(r["threshold"], r["version"], r["error"]) for r in rows} == {
            (limit, "panda-sample-fabric version 1", "")
        }
        encoded = [base64.b64encode(data).decode() for data, _, _ in cases]
        for body in (
            {"inputs": encoded},
            {"inputs": {"image": encoded}},
            {"instances": encoded},
            {"instances": [{"image": image} for image in encoded]},
            {"dataframe_records": [{"image": f"data:image/png;base64,{image}"} for image in encoded]},
        ):
            assert [r["score"] for r in answer(address, body)] == [score for _, score, _ in cases], list(body)
        (row,) = ask(address, [cases[-1][0]], heatmap=True)
        assert row["score"] == cases[-1][1]
        from panda_ad.data.images import decode

        heatmap = decode(base64.b64decode(row["heatmap"]), "heatmap")
        assert heatmap.shape == (32, 32, 3) and np.ptp(heatmap) == 255
        before, wrong, after = ask(address, [cases[0][0], b"not an image", cases[1][0]])
        assert [before["score"], after["score"]] == [cases[0][1], cases[1][1]] and before["error"] == ""
        assert (wrong["score"], wrong["anomalous"], wrong["decision"]) == (None, None, "error")
        assert "row 1: not an image" in wrong["error"]
        code, message = refused(address, {"inputs": encoded[:1] * 65})
        assert code == 413 and message.startswith("65 images: one request may hold at most 64 images, ")


@pytest.mark.slow
def test_a_request_that_cannot_be_answered_is_refused_in_a_line(project, tmp_path):
    image = base64.b64encode(evaluated(project)[0][0]).decode()
    with serving(project, tmp_path, ["panda_ad.cli", "serve", MODEL, "--port"]) as address:
        cases = (
            ({"inputs": [image], "params": {"heatmaps": True}}, 400, "params: unknown: heatmaps; there is heatmap"),
            ({"inputs": [image], "parms": {}}, 400, "unknown: parms; there are inputs"),
            ({"image": image}, 400, "a JSON object with one of inputs"),
            ({"inputs": {"picture": [image] * 60}}, 400, "Model is missing inputs ['image']"),
            ({"inputs": [image], "params": {"heatmap": "yes"}}, 400, "Invalid parameters found"),
            ({"inputs": ["A" * (65 * 2**20)]}, 413, "more than 64 MiB"),
        )
        for body, status, text in cases:
            code, message = refused(address, body)
            assert code == status and message.startswith(text), message
        assert [row["decision"] for row in answer(address, {"inputs": [image, 3, None]})][1:] == ["error", "error"]
        with ThreadPoolExecutor(48) as pool:  # 32 are computed or wait, the others are told to come again
            many = {"inputs": [image] * 64}
            statuses = Counter(pool.map(lambda _: status_of(address, many), range(48)))
        assert statuses.keys() == {200, 429} and statuses[200] >= 32
        with urllib.request.urlopen(f"{address}/metrics", timeout=5) as answered:
            text = answered.read().decode()
        judged = 64 * statuses[200] + 1
        counts = dict(re.findall(r'panda_verdicts_total\{decision="(\w+)"\} (\d+)', text))
        assert int(counts.get("good", 0)) + int(counts.get("defect", 0)) == judged and counts["error"] == "2"
        assert (
            f'panda_requests_total{{status="429"}} {statuses[429]}\n' in text and "panda_requests_waiting 0\n" in text
        )


def refused(address, body):
    """Status and message of a refused request; the whole answer is short."""
    try:
        answer(address, body)
    except urllib.error.HTTPError as error:
        text = error.read()
        assert len(text) < 700 and b"\\n" not in text, text
        return error.code, json.loads(text)["message"]
    raise AssertionError("was answered")


def status_of(address, body):
    """Status of the answer to a request."""
    try:
        answer(address, body)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def ask(address, images, **params):
    """One row per image."""
    body = {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(i).decode()] for i in images]}}
    return answer(address, body | ({"params": params} if params else {}))


def answer(address, body):
    """The predictions for a request's body."""
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.read())["predictions"]


@pytest.mark.slow
def test_a_new_version_takes_over_without_a_gap(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = make_monitored(tmp_path_factory, tmp_path / "plant")
    monkeypatch.chdir(folder)
    set_gate(folder, decision_margin=None)
    image = (next((folder / "data/fabric/test/good").iterdir())).read_bytes()
    with serving(
        folder, tmp_path, ["panda_ad.cli", "serve", "models:/panda-sample-fabric@staging", "--port"]
    ) as address:
        versions = [ask(address, [image])[0]["version"]]
        assert set_threshold("fabric", 2 / 7).outcome == "promoted"
        end = time.monotonic() + 60
        while versions[-1] == versions[0] and time.monotonic() < end:
            versions.append(ask(address, [image])[0]["version"])  # each is answered, or this raises
        assert (versions[0], versions[-1]) == ("panda-sample-fabric version 1", "panda-sample-fabric version 2")
        with urllib.request.urlopen(f"{address}/metrics", timeout=5) as answered:
            text = answered.read().decode()
        assert f'panda_requests_total{{status="200"}} {len(versions)}\n' in text
        assert 'panda_version_info{version="panda-sample-fabric version 2"} 1' in text
        (folder / "mlflow.db").rename(folder / "gone.db")  # the registry is away: the version in place goes on
        time.sleep(7)
        assert ask(address, [image])[0]["version"] == "panda-sample-fabric version 2"
