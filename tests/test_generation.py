"""The decoding loop against `model.generate`, prompt by prompt and alone."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, with_lora

from spectral_fast.embedded.make import make_tokenizer
from spectral_fast.evaluation.engines import Sampling, decoding

EOS = 1
N_NEW = 24


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    max_model_len: int | None = None,
    progress: Any = None,
    **sampling: Any,
) -> list[str]:
    """One text per prompt."""
    texts = decoding.generate(
        model,
        tokenizer,
        prompts,
        Sampling(max_new_tokens, **sampling),
        batch_size=batch_size,
        max_model_len=max_model_len,
        progress=progress,
    )
    return [text for [text] in texts]


def llama(seed: int = 0, **config: Any) -> Any:
    return tiny_llama(seed, vocab_size=100, max_position_embeddings=256, eos_token_id=EOS, **config).eval()


def mistral(window: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=window, eos_token_id=EOS,
        initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def prompts(n: int = 13, prefix: str = "", seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [prefix + "".join(rng.choices("abcdefgh +=", k=rng.randint(1, longest))) for _ in range(n)]


def alone(model: Any, tokenizer: Any, prompt: str, n_new: int = N_NEW) -> str:
    """What the library generates for this prompt without any batch, padding or cache of ours."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False, eos_token_id=EOS,
        pad_token_id=0,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def ends_early(model: Any, every: float) -> Any:
    """The model with its end token so likely that some texts end early and others late."""
    model.lm_head.weight.data[EOS] *= every
    return model


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("prefix", ["", "a common beginning, of examples perhaps: "])
def test_a_batch_gives_what_each_prompt_gives_alone(tokenizer: Any, batch_size: int, prefix: str) -> None:
    model = ends_early(llama(), 2.0)
    given = prompts(prefix=prefix)
    expected = [alone(model, tokenizer, prompt) for prompt in given]
    assert len({len(text) for text in expected}) > 4, "the model should end its texts at different places"
    assert generate(model, tokenizer, given, max_new_tokens=N_NEW, batch_size=batch_size) == expected


def test_a_sliding_window_is_kept(tokenizer: Any) -> None:
    model, given = mistral(window=8), prompts(7, prefix="a common beginning ", longest=30)
    expected = [alone(model, tokenizer, prompt) for prompt in given]
    assert generate(model, tokenizer, given, max_new_tokens=N_NEW, batch_size=4) == expected


def test_an_adapter_takes_part(tokenizer: Any) -> None:
    model = with_lora(llama()).eval()
    given = prompts(5)
    expected = [alone(model, tokenizer, prompt) for prompt in given]
    assert generate(model, tokenizer, given, max_new_tokens=N_NEW) == expected
    with model.disable_adapter():
        assert generate(model, tokenizer, given, max_new_tokens=N_NEW) != expected


def test_equal_prompts_and_prompts_that_begin_one_another(tokenizer: Any) -> None:
    model, given = llama(), ["abc", "abcde", "abc", "ab", "a", "abcdefgh"]
    expected = [alone(model, tokenizer, prompt) for prompt in given]
    assert generate(model, tokenizer, given, max_new_tokens=N_NEW) == expected
    assert generate(model, tokenizer, ["abc"] * 3, max_new_tokens=N_NEW) == [expected[0]] * 3


def test_a_real_end_token_in_the_prompt_is_seen(tokenizer: Any) -> None:
    model, given = llama(), ["ab<eos>cd", "ab<pad>cd", "abcd"]
    expected = [alone(model, tokenizer, prompt) for prompt in given]
    assert generate(model, tokenizer, given, max_new_tokens=N_NEW) == expected
    assert len(set(expected)) == 3


def test_texts_end_before_the_first_stop_string(tokenizer: Any) -> None:
    model, given = llama(), prompts(9)
    free = generate(model, tokenizer, given, max_new_tokens=60)
    stop = [free[0][11:14], free[3][30:31], free[5][0:2], "never in a text"]
    expected = [text[: min([len(text), *(text.find(s) for s in stop if s in text)])] for text in free]
    assert len({len(text) for text in expected}) > 3
    for batch_size in (2, 9):
        assert generate(model, tokenizer, given, max_new_tokens=60, batch_size=batch_size, stop=stop) == expected


def test_stopped_and_ended_rows_are_not_run_on(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = llama(), prompts(8)
    eight = generate(model, tokenizer, given, max_new_tokens=8)
    stop = [text[2:4] for text in eight]
    sizes: list[int] = []
    forward = model.forward

    def counted(**kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", counted)
    generate(model, tokenizer, given, max_new_tokens=150, stop=stop)
    assert len(sizes) == 8  # the first look for stop strings finds one in every text
    sizes.clear()
    generate(model, tokenizer, given, max_new_tokens=16, stop=stop[:4])
    n_running = sum(not any(s in text for s in stop[:4]) for text in eight)
    assert 0 < n_running <= 4
    assert sizes == [8] * 8 + [n_running] * 8


def test_progress_counts_every_prompt_once(tokenizer: Any) -> None:
    for model in (llama(), ends_early(llama(), 2.0)):
        for stop in ([], ["a", "b"]):
            counts: list[int] = []
            generate(
                model, tokenizer, prompts(), max_new_tokens=N_NEW, batch_size=4, stop=stop, progress=counts.append
            )  # fmt: skip
            assert sum(counts) == 13
            assert min(counts) > 0


def test_a_row_that_ended_ends_once_though_it_stays_in_the_batch(tokenizer: Any) -> None:
    spoken = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab<eos>cd<eos>", *["wxyz12"] * 4)]

    class Scripted:
        """Says its lines whatever it is asked; one of five rows that ends is too few to shrink the batch."""

        training, device = False, torch.device("cpu")
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=None))
        generation_config = SimpleNamespace(eos_token_id=EOS)
        step = 0

        def __call__(self, **_: Any) -> Any:
            tokens = torch.tensor([line[self.step] for line in spoken])
            self.step += 1
            return SimpleNamespace(logits=torch.nn.functional.one_hot(tokens, 100).float()[:, None])

    counts: list[int] = []
    texts = generate(Scripted(), tokenizer, list("pqrst"), max_new_tokens=6, progress=counts.append)
    assert texts == ["ab", *["wxyz12"] * 4]
    assert counts == [1, 4]


def test_nothing_gives_nothing(tokenizer: Any) -> None:
    assert generate(llama(), tokenizer, [], max_new_tokens=4) == []


def test_sampling_repeats_by_seed_and_does_not_depend_on_the_batches(tokenizer: Any) -> None:
    model, given = llama(), prompts(prefix="x")
    options = {"max_new_tokens": N_NEW, "temperature": 1.5, "top_p": 0.9}
    first = generate(model, tokenizer, given, seed=4, **options)
    assert generate(model, tokenizer, given, seed=4, batch_size=3, **options) == first
    assert generate(model, tokenizer, given[:5], seed=4, **options) == first[:5]
    assert generate(model, tokenizer, given, seed=5, **options) != first
    assert generate(model, tokenizer, given[::-1], seed=4, **options) == first[::-1]


def test_samples_of_one_prompt_differ_and_each_has_a_seed_of_its_own(tokenizer: Any) -> None:
    model, given = llama(), prompts(3, prefix="x")

    def sample(given: list[str], n: int, batch_size: int = 32) -> list[list[str]]:
        sampling = Sampling(N_NEW, temperature=1.5, top_p=0.9, seed=4, n=n)
        return decoding.generate(model, tokenizer, given, sampling, batch_size=batch_size)

    eight = sample(given, 8)
    assert [len(set(texts)) for texts in eight] == [8, 8, 8]
    assert sample(given, 8, batch_size=5) == eight
    assert sample(given[1:], 3) == [texts[:3] for texts in eight[1:]]


def test_greedy_samples_are_all_the_same_and_decoded_once(tokenizer: Any) -> None:
    counts: list[int] = []
    texts = decoding.generate(llama(), tokenizer, ["ab", "cd"], Sampling(N_NEW, n=3), progress=counts.append)
    assert texts == [[text] * 3 for text in generate(llama(), tokenizer, ["ab", "cd"], max_new_tokens=N_NEW)]
    assert sum(counts) == 6


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3)])
def test_sampled_tokens_have_the_models_probabilities(tokenizer: Any, temperature: float, top_p: float) -> None:
    model, n = llama(), 6000
    ids = torch.tensor([tokenizer("ab", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        p = (model(ids).logits[0, -1] / temperature).softmax(-1).double()
    order = p.argsort(descending=True)
    n_kept = int((p[order].cumsum(0) < top_p).sum()) + 1
    expected = torch.zeros_like(p)
    expected[order[:n_kept]] = p[order[:n_kept]] / p[order[:n_kept]].sum()
    sampling = Sampling(1, temperature, top_p, n=n)
    [texts] = decoding.generate(model, tokenizer, ["ab"], sampling, batch_size=n)
    shown = {text: i for i in range(3, 100) if (text := tokenizer.decode([i]))}
    count = torch.zeros_like(p)
    for text in texts:
        if text:
            count[shown[text]] += 1
    visible = torch.tensor(sorted(shown.values()))
    error = (count / n - expected)[visible].abs()
    assert (error <= 5 * (expected[visible] / n).sqrt() + 1e-12).all()  # five standard errors; nothing beyond top_p


def test_spaces_at_the_start_of_a_text_survive(tokenizer: Any) -> None:
    class Stripping:
        """Decodes as sentencepiece does: a space before the first token is lost."""

        eos_token_id = EOS

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer(*args, **kwargs)

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return tokenizer.decode(ids, **kwargs).removeprefix(" ")

    model = llama()
    space = tokenizer(" ", add_special_tokens=False)["input_ids"][0]
    model.lm_head.weight.data.zero_()
    model.lm_head = torch.nn.Linear(48, 100)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.nn.functional.one_hot(torch.tensor(space), 100).float()
    assert generate(model, Stripping(), ["a"], max_new_tokens=3) == ["   "]


def test_a_prompt_that_does_not_fit_is_refused_and_never_truncated(tokenizer: Any) -> None:
    model, given = llama(), ["ab", "c" * 200]
    with pytest.raises(
        ValueError, match=r"prompt 1 has 200 tokens, with 57 new ones more than 256 \(the model has 256"
    ):
        generate(model, tokenizer, given, max_new_tokens=57)
    with pytest.raises(ValueError, match=r"more than 100 \(the model has 256 positions, max_model_len is 100\)"):
        generate(model, tokenizer, given, max_new_tokens=2, max_model_len=100)
    assert len(generate(model, tokenizer, given, max_new_tokens=56)[1]) == 56
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, tokenizer, ["a", ""], max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": "ab"}, "stop must be a list"),
        ({"stop": ["a", ""]}, "stop must be a list of strings that are not empty"),
    ],
)
def test_arguments_out_of_range_are_refused(tokenizer: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llama(), tokenizer, ["a"], **{"max_new_tokens": 1, **options})


def test_a_model_in_training_mode_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        generate(llama().train(), tokenizer, ["a"], max_new_tokens=1)
