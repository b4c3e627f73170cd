"""Generation: equal to uncached decoding, rows independent, log-probabilities those of the sampled distribution."""

from copy import deepcopy as copy_of

import numpy as np
import pytest
import torch
from conftest import greedy, random_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llama2lib import generation
from llama2lib.generation import Completion, generate, next_logits, plain_weights, prefill, sample, stream
from llama2lib.model import KVCache, Llama

PROMPTS = [[1, 5, 9], [1, 7, 7, 7, 90, 31, 8], [1], [3, 2, 1, 0]]


def test_greedy_equals_uncached_decoding_in_a_ragged_batch(model):
    for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, 64, temperature=0), strict=True):
        assert completion.tokens == greedy(model, prompt, 64)
        assert not completion.finished


@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
def test_logprobs_are_those_of_the_whole_sequence(model, temperature):
    completions = generate(model, PROMPTS, 20, temperature=temperature, top_p=0.8, seed=3, num_samples=2)
    with torch.no_grad():
        for i, completion in enumerate(completions):
            tokens = torch.tensor([PROMPTS[i // 2] + completion.tokens])
            logprobs = (model(tokens)[0, :-1] / (temperature or 1)).log_softmax(-1)
            expected = logprobs.gather(-1, tokens[0, 1:, None])[-20:, 0]
            assert torch.allclose(expected, torch.tensor(completion.logprobs), atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(model):
    together = generate(model, PROMPTS, 30, temperature=1.2, seed=[10, 11, 12, 13], num_samples=2)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 30, temperature=1.2, seed=[10 + i], num_samples=2)
        assert [c.tokens for c in alone] == [c.tokens for c in together[2 * i : 2 * i + 2]]


def test_seeds_prompts_and_samples_have_streams_of_their_own():
    model = random_model()
    runs = [generate(model, [[1], [1]], 24, seed=seed, num_samples=3) for seed in (0, 1, 0)]
    assert [c.tokens for c in runs[0]] == [c.tokens for c in runs[2]]
    texts = [tuple(c.tokens) for c in runs[0] + runs[1]]
    assert len(set(texts)) == 12


def test_more_tokens_only_continue():
    model = random_model()
    short, long = (generate(model, PROMPTS, n, seed=5) for n in (7, 21))
    assert [c.tokens for c in short] == [c.tokens[:7] for c in long]


def test_rows_that_end_leave_without_disturbing_the_others():
    "EOS ends rows at different steps, so that the batch shrinks several times; each row ends with its EOS."
    model = random_model()
    free = generate(model, PROMPTS * 4, 60, temperature=1.5, seed=1)
    eos = 17
    ended = generate(model, PROMPTS * 4, 60, temperature=1.5, seed=1, eos_id=eos)
    assert 4 < sum(c.finished for c in ended) < 16
    for open_end, completion in zip(free, ended, strict=True):
        until = open_end.tokens.index(eos) + 1 if eos in open_end.tokens else 60
        assert completion.tokens == open_end.tokens[:until] and completion.finished == (
            until < 60 or eos == open_end.tokens[-1]
        )
        assert len(completion.logprobs) == len(completion.tokens)


def test_a_full_context_ends_a_row_and_not_its_neighbours():
    model = random_model(max_seq_len=32)
    long, short = generate(model, [[1] * 29, [1, 2]], 40, temperature=0)
    assert len(long.tokens) == 3 and len(short.tokens) == 30
    assert short.tokens == greedy(model, [1, 2], 30)


def test_stream_gives_the_same_tokens():
    model = random_model()
    whole = generate(model, [PROMPTS[1]], 40, 0.9, 0.95, seed=2, eos_id=17)[0]
    assert list(stream(model, PROMPTS[1], 40, 0.9, 0.95, seed=2, eos_id=17)) == whole.tokens


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log().expand(10_000, 4)
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    assert torch.bincount(sample(logits, uniform)[0], minlength=4).tolist() == [5000, 2000, 0, 3000]
    squared = torch.tensor([0.25, 0.04, 0, 0.09]) / 0.38  # temperature 1/2 squares them
    counts = torch.bincount(sample(logits, uniform, temperature=0.5)[0], minlength=4) / 10_000
    assert torch.allclose(counts, squared, atol=2e-4)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, {0}), (0.5, {0}), (0.51, {0, 3}), (0.81, {0, 1, 3}), (1.0, {0, 1, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64).log().expand(1000, 4)
    tokens, logprobs = sample(logits, (torch.arange(1000) + 0.5) / 1000, top_p=top_p)
    assert set(tokens.tolist()) == kept
    assert torch.allclose(logprobs.exp(), logits.exp().gather(-1, tokens[:, None])[:, 0])  # before top-p


def test_extreme_uniform_numbers_never_pick_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    tokens, _ = sample(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([[1], []], ValueError, r"prompts\[1\] is empty"),
        ([[1, 97]], ValueError, r"prompts\[0\]\[1\] is 97: the vocabulary has ids 0 to 96"),
        ([[1], [-1]], ValueError, r"prompts\[1\]\[0\] is -1"),
        ([[1] * 128], ValueError, r"prompts\[0\] has 128 tokens: the context of 128"),
        ([1, 2, 3], TypeError, r"prompts\[0\] is 1: expected a list of token ids"),
        (["text"], TypeError, r"prompts\[0\] is 'text'"),
        ([[1.9, 5.5]], TypeError, r"prompts\[0\] is \[1.9, 5.5\]"),
    ],
)
def test_bad_prompts_are_refused_with_their_place(prompts, error, message):
    with pytest.raises(error, match=message):
        generate(random_model(), prompts, 4)


def test_tensors_and_arrays_are_prompts_too():
    model = random_model()
    expected = generate(model, [[1, 5], [2, 6]], 5, seed=3)
    for prompts in (torch.tensor([[1, 5], [2, 6]]), np.array([[1, 5], [2, 6]]), [torch.tensor([1, 5]), (2, 6)]):
        assert generate(model, prompts, 5, seed=np.int64(3)) == expected


@pytest.fixture
def steps(monkeypatch) -> list[tuple[int, int]]:
    "Of every decoding step: its rows, and how many had come in by then."
    found, came, step, add = [], [], generation.next_logits, generation.Slots.add

    def spy(*arguments):
        found.append((arguments[3].shape[1], len(came)))
        return step(*arguments)

    monkeypatch.setattr(generation, "next_logits", spy)
    monkeypatch.setattr(generation.Slots, "add", lambda self, rows, *rest: came.extend(rows) or add(self, rows, *rest))
    return found


def ended_by(eos: int, free: list[Completion], limit: int) -> list[list[int]]:
    return [c.tokens[: c.tokens.index(eos) + 1] if eos in c.tokens else c.tokens[:limit] for c in free]


def test_no_step_works_for_rows_that_are_done(steps):
    model = random_model()
    free = generate(model, [[1]] * 32, 60, seed=1)
    eos = max(range(97), key=lambda token: sum(token in c.tokens[:30] for c in free))  # most rows meet it early
    steps.clear()
    ended = generate(model, [[1]] * 32, 60, seed=1, eos_id=eos)
    assert [c.tokens for c in ended] == ended_by(eos, free, 60)
    sizes = [size for size, _ in steps]
    assert sizes[0] == 32 - sum(len(c.tokens) == 1 for c in ended) and sizes[-1] < 16
    assert sum(sizes) == sum(len(c.tokens) - 1 for c in ended)  # the prefill gives the first token


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=1.3, top_p=0.9)], ids=["greedy", "sampled"])
def test_waiting_rows_come_in_and_get_what_they_would_get_alone(batch, settings, steps):
    "More rows than places, ragged, samples of one prompt apart: tokens and log-probabilities are those of full passes."
    model, eos = random_model(), 17
    prompts = [[1 + i, *range(20 + i, 20 + i + 3 * (i % 4))] for i in range(9)]
    settings = dict(seed=list(range(9)), eos_id=eos, num_samples=3, **settings)
    completions = generate(model, prompts, 40, batch=batch, **settings)
    assert sum(size for size, _ in steps) == sum(len(c.tokens) - 1 for c in completions)
    for size, came in steps:  # as long as rows wait, less than an eighth of the places is free
        assert size <= batch and (came == 27 or 8 * (batch - size) < batch)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 40, **settings | dict(seed=[i]))
        for one, other in zip(completions[3 * i : 3 * i + 3], alone, strict=True):
            assert one.tokens == other.tokens and one.finished == other.finished
            tokens = torch.tensor([prompt + one.tokens])
            with torch.no_grad():
                logits = model(tokens)[0, len(prompt) - 1 : -1] / (settings["temperature"] or 1)
            if settings["temperature"] == 0:
                assert logits.argmax(-1).tolist() == one.tokens
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
            assert torch.allclose(expected, torch.tensor(one.logprobs), atol=1e-4)


@pytest.mark.parametrize("batch", [2, 5, 64, 200])
def test_every_prompt_is_read_once_the_longest_first_and_not_too_many_together(batch, monkeypatch):
    monkeypatch.setattr(generation, "READ_TOGETHER", 24)
    model, read = random_model(), []
    hidden = model.hidden
    model.hidden = lambda tokens, cache: read.append(tokens[:, :2]) or hidden(tokens, cache)
    generate(model, [[i, *[0] * (i % 4)] for i in range(40)], 12, num_samples=3, eos_id=17, batch=batch)
    assert [i for part in read for i in part[:, 0].tolist()] == sorted(range(40), key=lambda i: -(i % 4))
    assert all(len(part) * (part[0, 0] % 4 + 1) <= 24 for part in read)
    assert batch < 24 or max(map(len, read)) > 6


@pytest.mark.parametrize("rows", [1, 3])
def test_the_compiled_step_gives_the_same(rows):
    "Ragged rows up to the end of the context, one after the other where there is one place; then with other weights."
    known = set(generation.COMPILED)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = random_model(max_seq_len=32)
        torch.nn.init.normal_(model.output.weight, std=0.3)
        for settings in (dict(temperature=0), dict(temperature=1.2, seed=5, eos_id=17)):
            prompts = [[1] * 9, [1, 5], [3, 2, 1, 0], [4]]
            eager = generate(model, prompts, 40, batch=rows, **settings)
            fused = generate(model, prompts, 40, batch=rows, compile=True, **settings)
            assert [c.tokens for c in fused] == [c.tokens for c in eager]
            for a, b in zip(eager, fused, strict=True):
                assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
    assert len(set(generation.COMPILED) - known) == 1
    assert list(stream(model, [1, 5], 20, 0, compile=True)) == greedy(model, [1, 5], 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copy", [False, True])
def test_a_step_is_the_models_forward_pass(model, dtype, copy):
    model, tokens = copy_of(model).to(dtype), torch.randint(97, (3, 12))
    with torch.inference_mode():
        cache = KVCache(model, 4, 16)  # one row more than is used
        lengths = torch.tensor([11, 7, 4])
        for row, length in enumerate(lengths.tolist()):
            one, _ = prefill(model, [tokens[row, :length].tolist()])
            cache.copy_rows([row], one, [0], length)
        inputs = torch.stack((tokens[range(3), lengths], lengths))
        got = next_logits(plain_weights(model, copy), cache, model.rope, inputs, 12, True, model.config.norm_eps)
        for row, length in enumerate(lengths.tolist()):
            expected = model(tokens[row : row + 1, : length + 1])[0, -1]
            assert torch.allclose(got[row], expected, atol=1e-4 if dtype == torch.float32 else 0.05)


def test_divided_weights_are_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = random_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="divided among ranks; expected whole ones"):
            generate(model, [[1]], 4)
    finally:
        torch.distributed.destroy_process_group()


def test_a_huge_limit_costs_nothing():
    "Random numbers are drawn for the context that is left, not for the limit."
    assert len(generate(random_model(max_seq_len=16), [[1]], 10**12)[0].tokens) == 15


SETTINGS = [dict(temperature=-1), dict(temperature=float("nan")), dict(temperature=1e-40), dict(top_p=0)]
SETTINGS += [dict(batch=0), dict(batch="all")]
SETTINGS += [dict(top_p=1.5), dict(seed=[1, 2]), dict(seed=-1), dict(num_samples=0), dict(num_samples=1.5)]
SETTINGS += [
    dict(temperature="hot"),
    dict(seed=None),
    dict(seed=1.0),
    dict(seed=[1.5]),
    dict(eos_id=97),
    dict(eos_id=[2]),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        generate(random_model(), [[1]], 4, **settings)


@pytest.mark.parametrize("limit", [-1, "5", 5.0])
def test_a_limit_that_is_no_number_of_tokens_is_refused(limit):
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(random_model(), [[1]], limit)


def test_a_model_that_has_generated_can_be_trained():
    "On a device where the rotation table is built late, it must not be a tensor of inference mode."
    filled = random_model()
    with torch.device("meta"):
        model = Llama(filled.config)
    model.load_state_dict(filled.state_dict(), assign=True)
    generate(model, [[1]], 3)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert model.layers[0].attention.wq.weight.grad is not None


def test_no_prompts_and_no_tokens_give_nothing():
    model = random_model()
    assert generate(model, [], 4) == []
    assert generate(model, [[1]], 0) == [Completion([], [], False)]


def test_logits_that_are_not_finite_stop_the_run():
    model = random_model()
    torch.nn.init.constant_(model.output.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="token 0 of row 0"):
        generate(model, [[1]], 4)
    with pytest.raises(FloatingPointError, match="token 0 of row 0"):
        list(stream(model, [1], 4))


def test_it_runs_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        completions = generate(random_model(), PROMPTS, 8, temperature=1.0, batch=2)
    assert all(len(c.tokens) == 8 for c in completions)


def test_it_runs_in_bfloat16():
    completions = generate(random_model().bfloat16(), PROMPTS, 8, temperature=1.0)
    assert all(len(c.tokens) == 8 for c in completions)
