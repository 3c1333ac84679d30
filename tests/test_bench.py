"""Benchmarks: what is compared is the same work, every measurement runs, and its results survive a round trip."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import LENGTH, MASK, VOCAB, packed_rows, random_params

from distil_jax import cli
from distil_jax.commands.bench import batching, inference, peers, record, step
from distil_jax.config.objective import LossConfig, MaskingConfig
from distil_jax.models.encoder import MaskedLm
from distil_jax.objective.distillation import distill_loss
from distil_jax.runtime.exit_codes import MachineFailed
from distil_jax.structs import IGNORED, Batch

SMALL_STEP = ["step", "--shape", "tiny", "--steps", "2", "--rounds", "2", "--set", "compute.unroll=no"]
SMALL_STEP += ["--dropout", "0", "--length", str(LENGTH)]
SMALL_LOSS = ["loss", "--length", "16", "--width", "8", "--chunk", "4", "--calls", "2", "--rounds", "2"]
SMALL_LOSS += ["--vocabularies", "256", "--tokens", "32"]
KEYS = ["measurement", "command", "date", "machine", "versions", "settings", "products", "lines"]
EDGES = ("torch", "transformers", "tokenizers", "datasets", "grain", "orbax", "tomli_w", "tensorboardX", "matplotlib")


def bench(arguments: list[str], tmp_path, capsys) -> tuple[dict, str]:
    """The record that a measurement leaves, and what it prints; the table made from the file is the printed one."""
    file = str(tmp_path / "results.json")
    assert cli.main(["bench", *arguments, "--output", file]) == 0
    printed = capsys.readouterr().out
    result = record.read(file)
    assert list(result) == KEYS and result["command"].startswith(f"distil-jax bench {arguments[0]} --")
    assert result["machine"]["cores"] >= 1 and result["versions"]["jax"] == jax.__version__
    assert cli.main(["bench", "table", file]) == 0
    assert capsys.readouterr().out.strip() == printed.partition("\n\nWrote")[0].strip()
    return result, printed


def test_the_step_beside_pytorch_on_prepared_rows(workshop, tmp_path, capsys):
    pytest.importorskip("torch")
    arguments = [*SMALL_STEP[:-2], "--rows", str(workshop / "rows"), "--peer", "torch", "--accumulation", "1"]
    result, printed = bench(arguments, tmp_path, capsys)
    ours, peer = result["lines"]
    assert "| torch:eager |" in printed and " mfu " not in printed  # a column without numbers
    assert (ours["side"], peer["side"]) == ("distil_jax", "torch:eager") and result["products"]["torch"] > 0
    assert peer["ours_is_faster_lowest"] <= peer["ours_is_faster"] <= peer["ours_is_faster_highest"]
    by_round = zip(ours["tokens_per_second_by_round"], peer["tokens_per_second_by_round"], strict=True)
    np.testing.assert_allclose(peer["ours_is_faster"], np.median([one / other for one, other in by_round]))
    assert 0.5 < ours["real_tokens_share"] < 1 and 0.5 < peer["real_tokens_share"] <= 1


def test_the_losses(tmp_path, capsys):
    (line,) = bench(SMALL_LOSS, tmp_path, capsys)[0]["lines"]
    assert line["vocabulary"] == 256 and line["tokens"] == 32
    assert line["dense_ms"] > 0 and line["fused_ms"] > 0 and line["fused_is_faster"] > 0
    assert line["dense_temporary_gib"] > 0 and line["fused_temporary_gib"] > 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_losses_on_a_tpu_that_is_not_there(tmp_path, capsys):
    large = ["--vocabularies", "16384", "--tokens", "4096"]  # more than the memory of a TPU's core
    (line,) = bench([*SMALL_LOSS, *large, "--topology", "v5e:2x2"], tmp_path, capsys)[0]["lines"]
    assert line["dense_temporary_gib"] > 0 and "dense_ms" not in line


def test_the_encoders_beside_pytorch(tmp_path, capsys):
    pytest.importorskip("torch")
    arguments = ["inference", "--shape", "tiny", "--batches", "2", "--lengths", "8", "--calls", "2", "--rounds", "2"]
    lines = bench([*arguments, "--peer", "torch"], tmp_path, capsys)[0]["lines"]
    sides = [(length, side) for length in (8,) for side in ("distil_jax", "torch")]
    assert [(line["length"], line["side"]) for line in lines] == sides
    assert all(line["teacher_p50_ms"] > 0 and line["student_is_faster"] > 0 for line in lines)
    assert all(("our_student_is_faster" in line) == (line["side"] == "torch") for line in lines)


def test_the_data(workshop, tmp_path, capsys):
    arguments = ["data", "--text", str(workshop / "text.txt"), "--tokenizer", str(workshop / "rows" / "tokenizer")]
    small = ["--rows", str(workshop / "rows"), "--batch-rows", "4", "--positions", "500", "--rounds", "2"]
    lines = bench([*arguments, *small], tmp_path, capsys)[0]["lines"]
    assert [line["work"] for line in lines] == ["encode_batch_fast", "prepare", "loader"]
    assert lines[1]["of_bare_tokenizer"] > 0 and lines[2]["length"] == LENGTH
    synthetic = bench(["data", "--positions", "1000", "--rounds", "1"], tmp_path, capsys)[0]["lines"]
    assert [(line["work"], line["length"]) for line in synthetic] == [("loader", 128), ("loader", 512)]


@pytest.mark.parametrize(("shape", "lengths"), [("tiny", [32, 64]), ("demo", [32, 128]), ("base", [32, 128])])
def test_rows_are_no_longer_than_the_model_takes_unless_one_says_so(shape, lengths):
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    assert step.read_work(parser.parse_args(["--shape", shape]), 0.1).length == lengths[-1]
    assert inference.row_lengths(None, peers.shape_model(shape).max_positions) == lengths


# The same work


def padded_batch() -> batching.Padded:
    """Masked sequences of several lengths."""
    masking, weights = MaskingConfig(rate=0.3, mask_token_id=MASK), np.zeros(128, np.float32)
    weights[5:VOCAB] = 1
    sequences = list(batching.unpack(packed_rows(6, seed=5)))
    (batch,) = batching.masked_batches(
        sequences,
        size=len(sequences),
        batching="random",
        weights=weights,
        masking=masking,
        length=LENGTH,
        seed=0,
    )
    return batch


def test_every_peers_loss_and_gradient_is_ours(teacher_config, teacher_params, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForMaskedLM

    from distil_jax.commands.bench import peer_torch
    from distil_jax.io import huggingface

    config = LossConfig(chunk=5)
    student_config = replace(teacher_config, num_layers=2, token_types=0)
    models = {
        "teacher": (teacher_config, teacher_params),
        "student": (student_config, random_params(student_config, 7)),
    }
    padded = padded_batch()
    batch = Batch.from_padded(padded.input_ids, padded.attention_mask, padded.labels)

    def ours(params):
        teacher = MaskedLm(teacher_config).apply({"params": teacher_params}, batch)
        return distill_loss(MaskedLm(student_config).apply({"params": params}, batch), teacher, batch, config=config)[0]

    expected, gradient = jax.jit(jax.value_and_grad(ours))(models["student"][1])
    opened = {}
    for name, (architecture, params) in models.items():
        huggingface.save(tmp_path / name, architecture, params)
        opened[name] = AutoModelForMaskedLM.from_pretrained(tmp_path / name, attn_implementation="sdpa")
    placed = peer_torch.put(padded, torch.device("cpu"))
    for loss in (peer_torch.gathered_loss, peer_torch.masked_loss, peer_torch.chunked_loss):
        opened["student"].zero_grad()
        result = loss(opened["teacher"].eval(), opened["student"].train(), placed, loss=config)
        np.testing.assert_allclose(result.item(), expected, rtol=1e-5)
        result.backward()
        words = opened["student"].get_input_embeddings().weight.grad.numpy()
        np.testing.assert_allclose(words, gradient["embeddings"]["word"][:VOCAB], atol=1e-5)


def test_a_compiled_peer_is_one_graph(step_config):
    """Without inductor, which would take minutes: what breaks the graph would break it there too."""
    torch = pytest.importorskip("torch")
    from distil_jax.commands.bench import peer_torch

    models = (replace(model, num_layers=1) for model in (step_config.teacher, step_config.student))
    teacher, student = map(peer_torch.build_model, models)
    placed = peer_torch.put(padded_batch(), torch.device("cpu"))
    compiled = torch.compile(peer_torch.masked_loss, backend="eager", fullgraph=True, dynamic=True)
    result = compiled(teacher.eval(), student, placed, loss=step_config.loss)
    np.testing.assert_allclose(
        result.item(), peer_torch.gathered_loss(teacher, student, placed, loss=step_config.loss).item(), rtol=1e-5
    )


def test_unpacked_rows_are_the_sequences():
    rows = packed_rows(16, seed=3)
    result = list(batching.unpack(rows))
    real = rows.segment_ids > 0
    assert np.array_equal(np.concatenate(result), rows.input_ids[real])
    assert len(result) == sum(rows.segment_ids.max(axis=1))
    assert all(sequence[0] == 2 and sequence[-1] == 3 and 3 not in sequence[1:-1] for sequence in result)


@pytest.mark.parametrize("kind", ["buckets", "random"])
def test_batches_hold_every_sequence_once(kind):
    lengths = np.random.default_rng(0).integers(3, 200, 1001)
    groups = batching.group(lengths, 8, kind, seed=1)
    assert sorted(np.concatenate(groups)) == list(range(1001))
    assert sorted(map(len, groups)) == [1] + [8] * 125
    padding = sum(lengths[each].max() * len(each) for each in groups) / lengths.sum() - 1
    assert padding < 0.1 if kind == "buckets" else padding > 0.5
    within = [each for each in groups if np.ptp((lengths[each] - 3) // 4) == 0]
    assert (len(within) > 80) == (kind == "buckets")


def test_masked_batches_keep_what_they_mask():
    batch = padded_batch()
    sequences = {tuple(each) for each in batching.unpack(packed_rows(6, seed=5))}
    restored = np.where(batch.labels != IGNORED, batch.labels, batch.input_ids)
    assert {tuple(ids[mask > 0]) for ids, mask in zip(restored, batch.attention_mask, strict=True)} == sequences
    lengths, targets = batch.attention_mask.sum(axis=1), (batch.labels != IGNORED).sum(axis=1)
    np.testing.assert_array_equal(targets, np.minimum(np.maximum(1, np.round(0.3 * lengths)), lengths - 2))
    assert batch.input_ids.shape[1] == lengths.max()


# Where it runs

LEFT_ALONE = """
import os
import signal

from distil_jax.commands.bench import peers

if __name__ == "__main__":
    with peers.pytorch() as make:
        print(make.args[0].submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_pytorchs_process_does_not_outlive_ours(tmp_path):
    (tmp_path / "left_alone.py").write_text(LEFT_ALONE)
    done = subprocess.run([sys.executable, tmp_path / "left_alone.py"], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    began = time.monotonic()
    while Path("/proc", done.stdout.strip()).exists():
        assert time.monotonic() - began < 60
        time.sleep(0.1)


def test_pytorchs_process_may_fail():
    with peers.pytorch() as make, pytest.raises(MachineFailed, match="PyTorch's process was killed"):
        make.args[0].submit(os._exit, 9)
        make("TorchStep")


def test_it_runs_where_none_of_the_edge_libraries_is_installed(tmp_path):
    """As on a GPU machine that has JAX, flax and optax alone."""
    file = tmp_path / "results.json"
    code = f"""
import importlib.util
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {EDGES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
sys.meta_path.insert(0, Blocked())
from distil_jax import cli
from distil_jax.commands.bench import data, inference, loss, step
assert cli.main(["bench", *{SMALL_STEP}, "--output", {str(file)!r}]) == 0
importlib.util.find_spec = lambda name: None
assert cli.main(["bench", *{SMALL_STEP}, "--peer", "torch"]) == 2
assert not set({EDGES}) & set(sys.modules)
"""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == (
        "distil-jax: --peer needs torch and transformers, and torch is not installed: pip install 'distil-jax[torch]'."
    )
    result = record.read(file)
    (line,) = result["lines"]
    assert line["side"] == "distil_jax" and line["dropout"] == 0 and line["real_tokens_share"] == 1
    assert line["tokens_per_second_lowest"] <= line["tokens_per_second"] <= line["tokens_per_second_highest"]
    assert len(line["tokens_per_second_by_round"]) == 2 and 0 < line["step_p50_ms"] <= line["step_p95_ms"]
    assert line["mfu"] is None and line["tflops"] > 0 and result["products"]["distil_jax"] > 0
    assert line["peak_said_by"] == "compiler" and line["peak_gib"] > 0 and line["compile_s"] > 0
    assert 0 <= line["data_wait_share"] < 1
    assert record.show(result) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL_STEP, "--steps", "1"], "--steps must be at least 2, not 1."),
        ([*SMALL_STEP, "--batch-rows", "0"], "--batch-rows must be at least 1, not 0."),
        ([*SMALL_STEP, "--batch-rows", "12"], "train.batch_rows 12 does not divide into 8 equal pieces"),
        ([*SMALL_STEP, "--length", "65"], "Rows of 65 are longer than the model's 64 positions"),
        ([*SMALL_STEP, "--dropout", "0.1;0"], "--dropout takes numbers separated by commas, not '0.1;0'."),
        ([*SMALL_STEP, "--set", "loss.chunks=3"], "did you mean loss.chunk?"),
        ([*SMALL_STEP, "--peer", "torch,jax"], "There is no peer 'jax' here: choose from torch:eager, torch:compile"),
        ([*SMALL_STEP, "--peer", "torch", "--set", "loss.mse=1.0"], "Peers implement a DistilBERT student"),
        ([*SMALL_STEP, "--rows", "nowhere"], "nowhere"),
        ([*SMALL_STEP, "--output", "no/such/folder/x.json"], "--output takes a file in an existing folder."),
        ([*SMALL_LOSS, "--tokens", "20"], "--tokens 20 is not a multiple of --length 16."),
        (["inference", "--shape", "tiny", "--lengths", "65"], "the model has 64 positions"),
        (["inference", "--shape", "tiny", "--peer", "torch:fused"], "There is no peer 'torch:fused' here"),
        (["data", "--text", "x.txt"], "--text and --tokenizer go together"),
        (["table", "nowhere.json"], "Cannot read nowhere.json"),
        (["table", __file__], "is not JSON"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys):
    if "torch" in arguments:
        pytest.importorskip("torch")
    assert cli.main(["bench", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_rows_that_do_not_fit_the_flags_are_refused(workshop, capsys):
    rows = ["--rows", str(workshop / "rows")]
    assert cli.main(["bench", *SMALL_STEP[:-1], "16", *rows]) == 2
    assert f"are {LENGTH} long: leave --length out." in capsys.readouterr().err


def test_a_file_that_is_no_record_is_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"measurement": "step"}))
    assert cli.main(["bench", "table", str(tmp_path / "x.json")]) == 2
    assert "has no results in it" in capsys.readouterr().err


def test_the_kept_results_can_be_shown(capsys):
    kept = sorted(record.RESULTS.glob("*.json"))
    assert cli.main(["bench", "table"]) == (0 if kept else 2)
    output = capsys.readouterr()
    assert output.out.count("`distil-jax bench ") == len(kept) and ("There are no results" in output.err) == (not kept)
