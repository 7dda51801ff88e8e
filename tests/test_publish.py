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

from spectral_fast import embedded
from spectral_fast.adapter import Adapter
from spectral_fast.cli import main
from spectral_fast.edit import edit_adapter
from spectral_fast.policies import POLICIES
from spectral_fast.publish import Upload, push_to_hub

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


def push(folder: Path, **options: Any) -> Upload:
    return push_to_hub(folder, NAME, token=TOKEN, **options)


def looked_at(folder: Path) -> Upload:
    return push_to_hub(folder, NAME, dry_run=True)


def test_what_was_pushed_comes_back_and_the_cards_lines_load_it(
    server: Hub, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(edited)
    done = push(edited)
    assert done.url == f"{server.endpoint}/{NAME}"
    assert done.files == {name: len(content) for name, content in sorted(server.files.items())}
    assert files(edited) == before
    assert server.created == [{"name": "an-adapter", "organization": "someone"}]
    assert [commit["summary"] for commit in server.commits] == ["Upload a LoRA adapter by spectral_fast"]

    snapshot = server.as_cache(tmp_path / "cache", NAME)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (snapshot, edited)]
    assert weights[0] == weights[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base_model").symlink_to(embedded.base_model_dir())
    pasted: dict[str, Any] = {}
    exec(done.card.partition("```python\n")[2].partition("```")[0], pasted)
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    here, there = load_file(edited / "adapter_model.safetensors"), pasted["model"].state_dict()
    for part in "AB":
        loaded = there[key.format(part).replace(".weight", ".default.weight")]
        assert torch.equal(loaded, here[key.format(part)].to(loaded.dtype))


def test_no_file_that_goes_up_names_a_folder_of_this_machine(server: Hub, edited: Path, tmp_path: Path) -> None:
    meta = json.loads((edited / "spectral_edit_meta.json").read_text())
    assert str(embedded.adapter_dir()) in json.dumps(meta)  # there is something to leak
    meta["meta"] |= {"note": f"see {tmp_path}/notes.txt: or file://{tmp_path}/x, ~/private/key"}
    (edited / "spectral_edit_meta.json").write_text(json.dumps(meta))
    config = json.loads((edited / "adapter_config.json").read_text())
    base = str(tmp_path / "models" / "llama")
    (edited / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    push(edited)
    for name, content in server.files.items():
        for part in (tmp_path, Path.home(), embedded.adapter_dir().parent, "/private"):
            assert str(part).encode() not in content, name
    assert json.loads(server.files["adapter_config.json"])["base_model_name_or_path"] == "./llama"
    sent = json.loads(server.files["spectral_edit_meta.json"])
    assert sent["sigma_stats"] == meta["sigma_stats"]
    assert sent["meta"]["note"] == "see ./notes.txt: or ./x, ./key"


def test_the_base_models_name_is_put_where_it_belongs(server: Hub, edited: Path) -> None:
    push(edited, base_model="meta-llama/Llama-2-7b-hf")
    config = json.loads((edited / "adapter_config.json").read_text())
    assert json.loads(server.files["adapter_config.json"]) == {
        **config,
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    }
    card = ModelCard(server.files["README.md"].decode())
    assert card.data.base_model == "meta-llama/Llama-2-7b-hf"
    assert "AutoModelForCausalLM.from_pretrained('meta-llama/Llama-2-7b-hf')" in card.text


def test_a_tokenizers_config_loses_paths_and_no_token(server: Hub, edited: Path, tmp_path: Path) -> None:
    tokens = {"5": {"content": "/a/b/c"}, "6": {"content": "/"}}
    config = {"name_or_path": str(tmp_path / "llama"), "added_tokens_decoder": tokens, "eos_token": "/"}
    (edited / "tokenizer_config.json").write_text(json.dumps(config))
    push(edited)
    assert json.loads(server.files["tokenizer_config.json"]) == {**config, "name_or_path": "./llama"}


def test_only_what_belongs_to_an_adapter_goes_up(server: Hub, edited: Path) -> None:
    for name in (".env", ".cache/x", "optimizer.pt", "checkpoint-5/x", "training_args.bin", "gsm8k_predictions.jsonl"):
        (edited / name).parent.mkdir(exist_ok=True)
        (edited / name).write_text("not for others")
    (edited / "adapter_model.bin").write_bytes(b"an older one")
    Path(os.fsdecode(os.fsencode(edited) + b"/\xff.txt")).touch()
    os.mkfifo(edited / "pipe")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE.txt"):
        (edited / name).write_text("kept")
    done = push(edited)
    assert list(done.files) == [
        *("LICENSE.txt", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
        *("spectral_edit_meta.json", "tokenizer.json"),
    ]
    assert sorted(server.files) == list(done.files)
    assert done.left_out == [
        *(".cache", ".env", "adapter_model.bin", "checkpoint-5", "gsm8k_predictions.jsonl", "optimizer.pt", "pipe"),
        *("training_args.bin", "\ufffd.txt"),
    ]


def test_a_snapshot_of_the_hubs_cache_may_be_pushed_and_links_out_of_the_folder_may_not(
    server: Hub, edited: Path, tmp_path: Path
) -> None:
    push(edited)
    snapshot = server.as_cache(tmp_path / "cache", NAME)
    assert looked_at(snapshot).card == looked_at(edited).card
    secret = tmp_path / "id_rsa"
    secret.write_text("a key")
    for name in ("tokenizer.json", "README.md"):  # the card would quote it
        (edited / name).symlink_to(secret)
        with pytest.raises(ValueError, match=rf"{name} is a link to .*id_rsa, which is not in the folder"):
            looked_at(edited)
        (edited / name).unlink()


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def cut_off(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 500)


def lose_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def break_link(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("nowhere")


def add_pipe(folder: Path) -> None:
    os.mkfifo(folder / "LICENSE")


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
        (break_link, "tokenizer.json is no plain file, or a broken link"),
        (add_pipe, "LICENSE is no plain file"),
        (break_record, "spectral_edit_meta.json is no record of spectral_fast (KeyError: 'sigma_stats')"),
        (break_json, "merge_meta.json is no JSON object"),
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
        looked_at(handmade(tmp_path / "shards", tensors=whole | empty))
    with pytest.raises(ValueError, match="unfinished, as its name says"):
        looked_at(handmade(tmp_path / ".edited.partial" / "new"))


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a b/c", "org/name.git", "/srv/x", "größe/x", "name-alone"])
def test_names_that_no_repository_can_have_are_refused(edited: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"repo_id must be ORG/NAME"):
        push_to_hub(edited, name)


@pytest.mark.parametrize(
    ("part", "status", "kind", "message"),
    [
        ("repos/create", 401, PermissionError, "does not let this token write .*: run `hf auth login`"),
        ("commit/main", 403, PermissionError, "does not let this token write to someone/an-adapter .*create_pr"),
        ("commit/main", 413, ValueError, r"the hub refuses someone/an-adapter"),
        ("validate-yaml", 400, ValueError, "Invalid metadata in README.md"),
        ("commit/main", 500, ConnectionError, "fails .*; nothing was published: try again later"),
    ],
)
def test_a_hub_that_refuses_is_quoted_and_nothing_is_published(
    server: Hub, edited: Path, part: str, status: int, kind: type[Exception], message: str
) -> None:
    server.refuse = {part: (status, "why not"), "GET /api/models/someone/an-adapter": (status, "why not")}
    with pytest.raises(kind, match=message):
        push(edited)
    assert server.files == {}


@pytest.mark.usefixtures("server")
def test_no_token_and_no_network_are_told_apart(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PermissionError, match="not logged in"):
        push_to_hub(edited, NAME)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"the upload to http://127\.0\.0\.1:9 failed \(Connect"):
        push(edited)


def test_a_private_repository_is_made_and_a_pull_request_proposed(server: Hub, edited: Path) -> None:
    done = push(edited, private=True, create_pr=True, commit_message="Second")
    assert done.url == f"{server.endpoint}/{NAME}/discussions/1"
    assert server.created[0]["visibility"] == "private"
    assert server.commits[0]["summary"] == "Second"


def test_the_command_shows_card_and_files_and_sends_them(
    server: Hub, edited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["push", "--lora_dir", str(edited), "--repo_id", NAME]
    assert main([*argv, "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert server.asked == []
    assert "# an-adapter" in out
    assert "--dry_run, nothing was published to someone/an-adapter: 4 files, " in out
    assert "adapter_model.safetensors      881,712" in out
    assert "by which nobody else finds it: give base_model" in err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\nMine, ± and all.\n")
    assert main([*argv, "--card", str(tmp_path / "mine.md"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["url"] == f"{server.endpoint}/{NAME}"
    assert result["files"] == {name: len(content) for name, content in sorted(server.files.items())}
    assert server.files["README.md"] == (tmp_path / "mine.md").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "--card", "x", "--results", "y"])
