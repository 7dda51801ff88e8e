"""`push`: which files go up, as the real client sends them, and what comes back down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_tools import files, handmade
from hub_tools import TOKEN, Hub, hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from toolbox_tools import peft_adapter

from spectral_fast import embedded
from spectral_fast.adapter import Adapter, resolve
from spectral_fast.cli import main
from spectral_fast.edit import edit_adapter
from spectral_fast.policies import POLICIES
from spectral_fast.publish import Publication, push_to_hub

NAME = "someone/an-adapter"
# The client's own, about how it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub(monkeypatch) as here:
        yield here


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """An edited copy, in a folder whose name must not get out."""
    folder = tmp_path / "secret-folder" / "edited"
    source = Adapter.open(embedded.adapter_dir())
    meta = {"target_modules": ["down_proj", "o_proj"]}
    edit_adapter(source, POLICIES["random_index"](), folder, modules=source.select(), meta=meta)
    return folder


def push(server: Hub, folder: Path, **options: Any) -> str:
    how = {name: options.pop(name) for name in ("base_model", "results", "card") if name in options}
    return Publication.of(folder, NAME, **how).send(token=TOKEN, endpoint=server.endpoint, **options)


def test_what_was_pushed_comes_back_with_the_same_weights_and_its_card(
    server: Hub, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(edited)
    assert push(server, edited) == f"{server.endpoint}/{NAME}"
    assert files(edited) == before
    assert server.created == [{"name": "an-adapter", "organization": "someone"}]
    assert [commit["summary"] for commit in server.commits] == ["Upload a LoRA adapter by spectral_fast"]

    snapshot = server.as_cache(tmp_path / "cache", NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = resolve(NAME, cache_dir=tmp_path / "cache")
    assert folder == snapshot
    there, here = Adapter.open(folder), Adapter.open(edited)
    assert there.modules == here.modules
    tensors = [load_file(adapter.weights.path) for adapter in (there, here)]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[1])
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["lora", "spectral_fast", "spectral-editing", "random_index"]


def test_peft_loads_what_was_pushed(server: Hub, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = peft_adapter(tmp_path / "adapter")
    push(server, adapter)
    snapshot = server.as_cache(tmp_path / "cache", NAME)
    models = [PeftModel.from_pretrained(tiny_llama(), str(folder)) for folder in (adapter, snapshot)]
    ids = torch.arange(9).reshape(1, 9)
    assert torch.equal(*(model(input_ids=ids).logits for model in models))


def test_no_file_that_goes_up_names_a_folder_of_this_machine(server: Hub, edited: Path, tmp_path: Path) -> None:
    meta = json.loads((edited / "spectral_edit_meta.json").read_text())
    assert str(embedded.adapter_dir()) in json.dumps(meta)  # there is something to leak
    meta["meta"] |= {"note": f"see {tmp_path}/notes.txt: or file://{tmp_path}/x, ~/private/key"}
    (edited / "spectral_edit_meta.json").write_text(json.dumps(meta))
    config = json.loads((edited / "adapter_config.json").read_text())
    base = str(tmp_path / "models" / "llama")
    (edited / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    push(server, edited)
    for name, content in server.files.items():
        for part in (tmp_path, Path.home(), embedded.adapter_dir().parent, "/private"):
            assert str(part).encode() not in content, name
    assert json.loads(server.files["adapter_config.json"])["base_model_name_or_path"] == "llama (local)"
    sent = json.loads(server.files["spectral_edit_meta.json"])
    assert sent["sigma_stats"] == meta["sigma_stats"]
    assert sent["meta"]["note"] == "see notes.txt: (local) or x (local), key (local)"


def test_the_base_models_name_is_put_where_it_belongs(server: Hub, edited: Path) -> None:
    push(server, edited, base_model="meta-llama/Llama-2-7b-hf")
    config = json.loads((edited / "adapter_config.json").read_text())
    assert json.loads(server.files["adapter_config.json"]) == {
        **config,
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    }
    card = ModelCard(server.files["README.md"].decode())
    assert card.data.base_model == "meta-llama/Llama-2-7b-hf"
    assert "AutoModelForCausalLM.from_pretrained('meta-llama/Llama-2-7b-hf')" in card.text


def test_caches_states_and_generations_stay_here(server: Hub, edited: Path) -> None:
    for name in (".env", ".cache/x", "__pycache__/x.pyc", "optimizer.pt", "rng_state_0.pth", "checkpoint-5/x"):
        (edited / name).parent.mkdir(exist_ok=True)
        (edited / name).write_text("not for others")
    for name in ("gsm8k_predictions.jsonl", "samples_lora.jsonl", "samples_lora.jsonl_results.jsonl"):
        (edited / name).write_text("{}")
    (edited / "adapter_model.bin").write_bytes(b"an older one")
    (edited / "examples").mkdir()
    (edited / "examples" / "größe.txt").write_text("kept")
    found = Publication.of(edited, NAME)
    assert [content.name for content in found.contents] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "examples/größe.txt",
        "spectral_edit_meta.json",
    ]
    assert found.left_out["adapter_model.bin"] == "adapter_model.safetensors is what is read"
    assert found.left_out[".env"] == "hidden"
    assert len(found.left_out) == 10
    found.send(token=TOKEN, endpoint=server.endpoint)
    assert sorted(server.files) == [content.name for content in found.contents]


def test_a_large_file_is_listed_and_not_read(edited: Path) -> None:
    with (edited / "large.gguf").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)  # a hole of a terabyte
    [large] = [content for content in Publication.of(edited, NAME).contents if content.name == "large.gguf"]
    assert (large.size, large.source) == (1 << 40, edited / "large.gguf")


def test_a_snapshot_of_the_hubs_cache_may_be_pushed_and_other_links_out_of_the_folder_may_not(
    server: Hub, edited: Path, tmp_path: Path
) -> None:
    push(server, edited)
    snapshot = server.as_cache(tmp_path / "cache", NAME)
    assert Publication.of(snapshot, NAME).contents
    secret = tmp_path / "id_rsa"
    secret.write_text("a key")
    (edited / "notes.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"notes\.txt is a link to .*id_rsa, which is not in the folder"):
        Publication.of(edited, NAME)
    (edited / "notes.txt").rename(edited / "README.md")  # which the card would quote
    with pytest.raises(ValueError, match=r"README\.md is a link to .*id_rsa"):
        Publication.of(edited, NAME)
    (edited / "README.md").unlink()
    (edited / "all").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"all is a link to"):
        Publication.of(edited, NAME)


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def cut_off(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 500)


def lose_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def break_link(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("nowhere")


def add_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def add_odd_name(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).touch()


def break_record(folder: Path) -> None:
    (folder / "spectral_edit_meta.json").write_text('{"meta": {"mode": "abs_select"}}')


def break_json(folder: Path) -> None:
    (folder / "merge_meta.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put_nan, "has NaN or infinite values: mend the adapter first"),
        (cut_off, "adapter_model.safetensors"),
        (lose_config, "has no adapter_config.json"),
        (break_link, "notes.txt is a broken link"),
        (add_pipe, "pipe is no plain file"),
        (add_odd_name, "is no text that a repository can hold"),
        (break_record, "spectral_edit_meta.json is no record of spectral_fast (KeyError: 'sigma_stats')"),
        (break_json, "merge_meta.json is no JSON"),
    ],
)
def test_a_folder_that_should_not_be_published_is_refused_before_anything_is_sent(
    edited: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(edited)
    assert main(["push", "--lora_dir", str(edited), "--repo_id", NAME, "--dry_run"]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_weights_saved_from_shards_and_unfinished_folders_are_refused(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    whole = {key.format("A"): torch.ones(4, 6), key.format("B"): torch.ones(5, 4)}
    empty = {name.replace("o_proj", "q_proj"): torch.empty(0) for name in whole}
    with pytest.raises(ValueError, match=r"q_proj.* is empty; was it saved from shards"):
        Publication.of(handmade(tmp_path / "shards", tensors=whole | empty), NAME)
    with pytest.raises(ValueError, match=r"unfinished: a run writes to \.edited\.partial"):
        Publication.of(handmade(tmp_path / ".edited.partial" / "new"), NAME)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "../x", "a b", "org/name.git", "org/--", "/srv/x", "größe", "name-alone", "o/" + "a" * 97]
)
def test_names_that_no_repository_can_have_are_refused(edited: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"repo_id must be ORG/NAME"):
        push_to_hub(edited, name)


@pytest.mark.parametrize(
    ("part", "status", "kind", "message"),
    [
        ("repos/create", 401, PermissionError, "does not know this token .*: run `hf auth login`"),
        ("repos/create", 403, PermissionError, "may not write to someone/an-adapter .*create_pr"),
        ("commit/main", 403, PermissionError, "may not write to someone/an-adapter"),
        ("commit/main", 413, ValueError, r"the hub refuses someone/an-adapter"),
        ("validate-yaml", 400, ValueError, "someone/an-adapter: Invalid metadata in README.md"),
        ("commit/main", 500, ConnectionError, "fails .*; nothing was published: try again later"),
    ],
)
def test_a_hub_that_refuses_is_quoted_in_one_line(
    server: Hub, edited: Path, part: str, status: int, kind: type[Exception], message: str
) -> None:
    server.refuse = {part: (status, "why not"), "GET /api/models/someone/an-adapter": (status, "why not")}
    with pytest.raises(kind, match=message) as caught:
        push(server, edited)
    assert "\n" not in str(caught.value)
    assert server.files == {}


def test_a_wrong_token_none_and_no_network_are_told_apart(
    server: Hub, edited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Publication.of(edited, NAME)
    with pytest.raises(PermissionError, match="does not know this token"):
        found.send(token="hf_of-somebody-else", endpoint=server.endpoint)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PermissionError, match="not logged in"):
        found.send(endpoint=server.endpoint)
    with pytest.raises(ConnectionError, match=r"the upload to http://127\.0\.0\.1:9 failed \(Connect"):
        found.send(token=TOKEN, endpoint="http://127.0.0.1:9")


def test_a_branch_is_made_and_a_pull_request_proposed(server: Hub, edited: Path) -> None:
    url = push(server, edited, revision="v2", private=True, commit_message="Second")
    assert url == f"{server.endpoint}/{NAME}/tree/v2"
    assert f"POST /api/models/{NAME}/branch/v2" in server.asked
    assert server.created[0]["visibility"] == "private"
    assert server.commits[0]["summary"] == "Second"
    assert push(server, edited, create_pr=True) == f"{server.endpoint}/{NAME}/discussions/1"
    with pytest.raises(ValueError, match="a pull request is made against main"):
        push(server, edited, create_pr=True, revision="v2")


def test_the_command_shows_card_and_files_and_sends_them(
    server: Hub, edited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["push", "--lora_dir", str(edited), "--repo_id", NAME]
    assert main([*argv, "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert server.asked == []
    assert "# an-adapter" in out
    assert "--dry_run, nothing was published to someone/an-adapter: 4 files, 8" in out
    assert "adapter_model.safetensors   881.7 kB" in out
    assert "by which nobody else finds it: give base_model" in err
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\nMine, ± and all.\n")
    assert main([*argv, "--card", str(tmp_path / "mine.md"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["url"] == f"{server.endpoint}/{NAME}"
    assert result["files"] == {name: len(content) for name, content in sorted(server.files.items())}
    assert server.files["README.md"] == (tmp_path / "mine.md").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "--card", "x", "--results", "y"])
