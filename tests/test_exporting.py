# SPDX-License-Identifier: Apache-2.0
"""`layerwise export`: what torch, DCP and transformers read is what the training held, to the bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from kit.cli import call, call_json
from kit.shards import differing
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import layerwise_dist as lwd
from layerwise_dist.exporting import contents as exported
from layerwise_dist.exporting import hugging_face, output
from layerwise_dist.exporting.contents import Weight
from layerwise_dist.reading.tensor import LazyTensor

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.norm, self.frozen = nn.BatchNorm1d(5), nn.Linear(5, 5).requires_grad_(False)
        self.head.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.frozen(self.mid(self.emb(x)))))


def build(seed: int) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    groups = [{"params": [*model.mid.parameters()], "lr": 0.3}, {"params": [*model.norm.parameters()]}]
    rest = [model.emb.weight, *model.frozen.parameters()]
    return model, torch.optim.AdamW([*groups, {"params": rest, "weight_decay": 0.5}], lr=0.1)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(torch.arange(7) * (step + 1) % 7).square().mean().backward()
    optimizer.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net, torch.optim.Optimizer]:
    folder = tmp_path_factory.mktemp("exporting")
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(folder), keep_last=9) as ckpt:
        for step in ckpt.steps(3):
            update(model, optimizer, step)
    return folder, model, optimizer


def flat(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts and lists; a number counts as one."""
    if isinstance(value, torch.Tensor):
        return {path: value.detach().clone()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: each for name, inner in items for key, each in flat(inner, f"{path}/{name}").items()}
    return {path: torch.tensor(value)} if isinstance(value, int | float) else {}


def test_torch_reads_a_file_that_both_load_state_dicts_take_and_trains_on(
    trained: tuple[Path, Net, Any], tmp_path: Path
) -> None:
    folder, model, optimizer = trained
    code, said = call_json("export", folder, tmp_path / "all.pt", "--format", "torch")
    assert code == 0 and said["step"] == 3 and said["optimizers"] == [""] and list(said["files"]) == ["all.pt"]
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert differing(flat(found["model"]), flat(dict(model.state_dict()))) == []
    assert found["model"]["head.weight"].data_ptr() == found["model"]["emb.weight"].data_ptr()
    assert differing(flat(found["optimizer"]), flat(optimizer.state_dict())) == []
    other, mine = build(1)
    other.load_state_dict(found["model"])
    mine.load_state_dict(found["optimizer"])
    same, its = build(2)
    same.load_state_dict(model.state_dict())
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which would share tensors
    update(other, mine, 3)
    update(same, its, 3)
    assert differing(flat([other.state_dict(), mine.state_dict()]), flat([same.state_dict(), its.state_dict()])) == []


def test_dcp_reads_model_and_optimizer_as_get_state_dict_names_them(
    trained: tuple[Path, Net, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, optimizer = trained
    monkeypatch.setattr(exported, "CHUNK_BYTES", 48)  # two rows of the embedding
    code, said = call_json("export", folder, tmp_path / "dcp", "--format", "dcp")
    assert code == 0 and ".metadata" in said["files"]
    other, mine = build(1)
    update(other, mine, 0)
    weights, state = get_state_dict(other, mine)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(other, mine, model_state_dict=weights, optim_state_dict=state)
    assert differing(flat(dict(other.state_dict())), flat(dict(model.state_dict()))) == []
    assert differing(flat(mine.state_dict()), flat(optimizer.state_dict())) == []
    kept = dcp.FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    assert len(kept["model.emb.weight"].chunks) == 4


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_what_was_exported_is_imported_bit_for_bit(trained: tuple[Path, Net, Any], tmp_path: Path, kind: str) -> None:
    folder, model, optimizer = trained
    names = {id(param): name for name, param in model.named_parameters()}
    order = [names[id(param)] for group in optimizer.param_groups for param in group["params"]]
    (tmp_path / "names").write_text("".join(f"{name}\n" for name in order))
    assert call("export", folder, tmp_path / "out", "--format", kind)[0] == 0
    code, said = call(
        "import", tmp_path / "out", tmp_path / "back", "--allow-pickle", "--optimizer", "AdamW", "--buffer",
        "norm.running_*", *(("--names", tmp_path / "names") if kind == "torch" else ()),
    )  # fmt: skip
    assert code == 0, said
    with lwd.open_checkpoint(folder) as before, lwd.open_checkpoint(tmp_path / "back") as after:
        assert differing({name: after[name][...] for name in after}, {name: before[name][...] for name in before}) == []
    other, mine = build(1)
    with lwd.attach(other, mine, dir=str(tmp_path / "back")) as ckpt:
        ckpt.restore()
    assert (
        differing(flat([other.state_dict(), mine.state_dict()]), flat([model.state_dict(), optimizer.state_dict()]))
        == []
    )


def test_a_file_of_one_group_says_by_its_order_which_number_is_whose(tmp_path: Path) -> None:
    """`0.bias` sorts before `0.weight`, and the optimizer numbers the weight first."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with lwd.attach(model, optimizer, dir=str(tmp_path / "run")) as ckpt:
        for _ in ckpt.steps(2):
            model(torch.randn(5, 3)).sum().backward()
            optimizer.step()
    assert call("export", tmp_path / "run", tmp_path / "out.pt", "--format", "torch")[0] == 0
    assert list(torch.load(tmp_path / "out.pt")["model"]) == [name for name, _ in model.named_parameters()]
    code, said = call("import", tmp_path / "out.pt", tmp_path / "back", "--allow-pickle", "--optimizer", "AdamW")
    assert code == 0, said
    with lwd.open_checkpoint(tmp_path / "run") as before, lwd.open_checkpoint(tmp_path / "back") as after:
        assert differing({name: after[name][...] for name in after}, {name: before[name][...] for name in before}) == []


def test_safetensors_reads_weights_in_files_of_the_size_that_was_asked_for(
    trained: tuple[Path, Net, Any], tmp_path: Path
) -> None:
    folder, model, _ = trained
    code, said = call_json(
        "export", folder, tmp_path / "hf", "--max-shard-size", "150", "--step", "2", "--rename", "mid.=center.",
        "--dtype", "bf16",
    )  # fmt: skip
    assert code == 0 and said["step"] == 2 and "model.safetensors.index.json" in said["files"]
    with lwd.open_checkpoint(folder, step=2) as ckpt:
        wanted = {key: ckpt[name][...] for key, name in ckpt.weights().items() if key != "head.weight"}
    wanted = {
        key.replace("mid.", "center."): each.bfloat16() if each.is_floating_point() else each
        for key, each in wanted.items()
    }
    found = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            found |= {key: shard.get_tensor(key) for key in shard.keys()}
    assert differing(found, wanted) == []


def test_a_part_of_a_tensor_is_in_memory_at_a_time(
    trained: tuple[Path, Net, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = LazyTensor._read, []

    def seen(self: LazyTensor, wanted: Any, shape: Any) -> torch.Tensor:
        found = read(self, wanted, shape)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(LazyTensor, "_read", seen)
    monkeypatch.setattr(exported, "CHUNK_BYTES", 24)
    for kind in ("hf", "dcp"):
        code, _ = call("export", trained[0], tmp_path / kind, "--format", kind)
        assert code == 0 and max(sizes) <= 24 and len(sizes) > 20
        sizes.clear()


# -- nothing half-done ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "dcp", "torch"])
def test_an_interruption_leaves_nothing(
    trained: tuple[Path, Net, Any], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = LazyTensor._read, 0

    def interrupted(self: LazyTensor, wanted: Any, shape: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return read(self, wanted, shape)

    monkeypatch.setattr(LazyTensor, "_read", interrupted)
    code, _ = call("export", trained[0], tmp_path / "out", "--format", kind)
    assert code != 0 and count == 5 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "mutation: nothing is flushed"])
@pytest.mark.parametrize("folder", [True, False])
def test_an_export_is_flushed_before_and_after_it_gets_its_name(
    folder: bool, careless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(name: str, path_of: Callable[..., str]) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *of: (done.append(f"{name} {path_of(*of)}"), real(*of))[1])

    noted("fsync", lambda file: os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
    noted("rename" if folder else "link", lambda _, target: target.name)
    if careless:
        monkeypatch.setattr(output, "flush", lambda path: None)
    with output.beside(tmp_path / "out", folder=folder) as made:
        for path in [made / "a", made / "b"] if folder else [made]:
            path.write_bytes(b"x")
    whole = [*(["fsync a", "fsync b"] if folder else []), "fsync out", "rename out" if folder else "link out"]
    assert (done == [*whole, f"fsync {tmp_path.name}"]) is not careless


def test_nothing_that_is_there_is_overwritten(trained: tuple[Path, Net, Any], tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for kind, out in (("torch", "file.pt"), ("hf", "folder"), ("dcp", "folder")):
        code, said = call_json("export", trained[0], tmp_path / out, "--format", kind)
        assert code == 2 and "overwrites nothing" in said["error"]
    with pytest.raises(FileExistsError):
        with output.beside(tmp_path / "late.pt", folder=False) as made:
            made.write_text("new")
            (tmp_path / "late.pt").write_text("mine")
    assert (tmp_path / "file.pt").read_text() == (tmp_path / "late.pt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file.pt", "folder", "late.pt"]


@pytest.mark.parametrize("kind", ["hf", "dcp", "torch"])
def test_what_reads_back_otherwise_than_it_was_written_is_no_export(
    trained: tuple[Path, Net, Any], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = output.flush

    def spoiled(path: Path) -> None:
        """As a disk that lies: one bit of a tensor changes once its file is flushed."""
        real(path)
        content = path.read_bytes()
        with lwd.open_checkpoint(trained[0]) as ckpt:
            at = content.find(ckpt["param/mid.weight"][...].numpy().tobytes())
        if at >= 0:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])

    for module in ("hugging_face", "dcp", "torch_file"):
        monkeypatch.setattr(f"layerwise_dist.exporting.{module}.flush", spoiled)
    code, said = call_json("export", trained[0], tmp_path / "out", "--format", kind)
    assert code == 1 and os.listdir(tmp_path) == [], said


def test_damage_is_named_and_nothing_is_exported(trained: tuple[Path, Net, Any], tmp_path: Path) -> None:
    model, optimizer = build(0)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt")) as ckpt:
        for step in ckpt.steps(1):
            update(model, optimizer, step)
    [shard] = (tmp_path / "ckpt").glob("step_*/rank_00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8 + 40] ^= 1
    shard.write_bytes(content)
    code, said = call_json("export", tmp_path / "ckpt", tmp_path / "out")
    assert code == 1 and str(shard) in said["error"] and os.listdir(tmp_path) == ["ckpt"]


def test_wrong_usage_is_said(trained: tuple[Path, Net, Any], tmp_path: Path) -> None:
    folder, out = trained[0], tmp_path / "out"
    for args, said in (
        (("--format", "npz"), "must be one of hf, dcp, torch"),
        (("--dtype", "int4"), "must be one of fp32, bf16, fp16, fp64"),
        (("--step", "9"), "no committed checkpoint of step 9"),
        (("--tag", "best"), "no committed checkpoint under the tag 'best'"),
        (("--step", "1", "--tag", "best"), "give --step or --tag"),
        (("--model", "ema"), "one model, which has no name"),
        (("--rename", "a.b"), "expected OLD=NEW"),
        (("--rename", "mid.=", "--rename", "norm.="), "both become param/"),
        (("--max-shard-size", "much"), "is not a number such as"),
        (("--like", str(tmp_path / "none")), "no such folder"),
        (("--format", "dcp", "--like", str(tmp_path)), "is for --format hf"),
    ):
        code, found = call_json("export", folder, out, *args)
        assert code == 2 and said in found["error"], (args, found)
    assert call("export", tmp_path / "nothing", out)[0] == 2 and os.listdir(tmp_path) == []
    code, text = call("export", "--help")
    assert code == 0 and "load_state_dict" in text and max(map(len, text.splitlines())) <= 80


def test_one_of_several_models_with_the_optimizer_that_updates_it_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Linear(3, 2)}
    optimizers = {
        "one": torch.optim.SGD(models["a"].parameters(), lr=0.1, momentum=0.9),
        "both": torch.optim.SGD([*models["b"].parameters(), *models["c"].parameters()], lr=0.1, momentum=0.9),
    }
    with lwd.attach(models=models, optimizers=optimizers, dir=str(tmp_path / "ckpt")) as ckpt:
        for _ in ckpt.steps(1):
            sum(model(torch.ones(1, 3)).sum() for model in models.values()).backward()
            for optimizer in optimizers.values():
                optimizer.step()
    code, said = call_json("export", tmp_path / "ckpt", tmp_path / "a.pt", "--format", "torch", "--model", "a")
    assert code == 0 and said["optimizers"] == ["one"]
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    models["c"].load_state_dict(found["model"])
    assert differing(flat(found["optimizer"]), flat(optimizers["one"].state_dict())) == []
    code, said = call_json("export", tmp_path / "ckpt", tmp_path / "b.pt", "--format", "torch", "--model", "b")
    assert code == 2 and "--weights-only" in said["error"]
    code, said = call_json(
        "export", tmp_path / "ckpt", tmp_path / "b.pt", "--format", "torch", "--model", "b", "--weights-only"
    )
    assert code == 0 and torch.load(tmp_path / "b.pt", weights_only=True).keys() == {"model"}
    code, said = call_json("export", tmp_path / "ckpt", tmp_path / "none")
    assert code == 2 and "name one of a, b, c" in said["error"]


def test_mutation_a_file_that_is_not_read_back_is_caught(
    trained: tuple[Path, Net, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hugging_face, "_read_back", lambda path, pieces: None)
    with pytest.raises(AssertionError):
        test_what_reads_back_otherwise_than_it_was_written_is_no_export(trained, tmp_path, "hf", monkeypatch)


# -- transformers -----------------------------------------------------------------------------------------------------


def language_model(kind: str, tied: bool) -> Any:
    import transformers

    small = {"vocab_size": 41, "tie_word_embeddings": tied}
    wide = {**small, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
    config = {
        "gpt2": lambda: transformers.GPT2Config(**small, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "llama": lambda: transformers.LlamaConfig(**wide),
        "mixtral": lambda: transformers.MixtralConfig(**wide, num_local_experts=3, num_experts_per_tok=2),
    }[kind]()
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_from_pretrained_computes_the_same_logits_to_the_bit(tmp_path: Path, kind: str, tied: bool) -> None:
    import transformers

    model = language_model(kind, tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.arange(24).reshape(2, 12) * 5 % 41
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt")) as ckpt:
        for _ in ckpt.steps(2):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
    like = tmp_path / "like"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(like)
    (like / "tokenizer.json").write_text("{}")
    (like / "model.safetensors.index.json").write_text("{}")
    code, said = call_json("export", tmp_path / "ckpt", tmp_path / "out", "--like", like)
    assert code == 0, said
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(said["files"])
    assert "model.safetensors.index.json" not in said["files"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as shard:
        assert ("lm_head.weight" in shard.keys()) is not tied
    other, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert differing(dict(other.state_dict()), dict(model.state_dict())) == []
    with torch.device("meta"):
        bare = type(model)(model.config)
    lwd.load(bare, tmp_path / "ckpt")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, bare.eval()(tokens).logits)

    # And back: trained on by hand, saved as transformers does, imported, loaded.
    by_hand = torch.optim.AdamW(other.parameters(), lr=0.01)
    other.train()(tokens, labels=tokens).loss.backward()
    by_hand.step()
    other.eval().save_pretrained(tmp_path / "on")
    code, said = call("import", tmp_path / "on", tmp_path / "back")
    assert code == 0, said
    again = language_model(kind, tied).eval()
    lwd.load(again, tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, other(tokens).logits)
        assert not torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_tied_weight_goes_under_the_key_that_the_architecture_keeps() -> None:
    weight = Weight("lm_head.weight", None, torch.float32, ("model.embed_tokens.weight",))  # type: ignore[arg-type]
    moved = hugging_face._under_the_right_key(weight, ["lm_head.weight"])
    assert (moved.key, moved.tied) == ("model.embed_tokens.weight", ("lm_head.weight",))
    assert hugging_face._under_the_right_key(weight, []) == weight


_PEAK = """
import resource, sys
from layerwise_dist.exporting.export import export
import layerwise_dist as lwd

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with lwd.open_checkpoint(sys.argv[1]) as ckpt:
    export(ckpt, sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["hf", "dcp"])
def test_a_large_state_takes_little_memory(tmp_path: Path, kind: str, long: bool) -> None:
    if not long:
        pytest.skip("writes 1.6 GB: with --long")
    model = nn.Sequential(nn.Embedding(150_000, 1000), *(nn.Linear(5000, 5000, bias=False) for _ in range(2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "ckpt")) as ckpt:
        for _ in ckpt.steps(1):
            optimizer.step()
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "ckpt"), str(tmp_path / "out"), kind]
    taken = 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert taken < 5 * exported.CHUNK_BYTES
