"""Layouts of an epoch: counts against plain loops over the documents and the real packs."""

from dataclasses import replace

import pytest

from foundry_ext.preflight.inspect.layouts import Segment, lay_out, wrap
from tests.data.kit import build, walk


@pytest.fixture
def made(make_rows, write_jsonl, tokenizer, tmp_path, monkeypatch):
    """Return a function from settings to a data set of 90 rows and its real packs."""
    monkeypatch.chdir(tmp_path)
    rows = str(write_jsonl(make_rows(90, longest=30), "rows.jsonl"))

    def make(**settings):
        settings = {"hf_name": rows, "split": "train", "max_seq_len": 160, **settings}
        loader = build(tokenizer, {"pack_tokens": 512, "shuffle": True, **settings}, size=1)
        dataset = loader.dataloader.dataset
        dataset.sampler.set_epoch(0)
        return dataset, [pack for batch in walk(loader) for pack in batch]

    return make


def test_documents_are_wrapped_as_text_is():
    assert wrap([3, 2], 4) == [[Segment(0, 0, 3), Segment(1, 3, 1)], [Segment(1, 0, 1)]]
    assert wrap([9], 4) == [[Segment(0, 0, 4)], [Segment(0, 0, 4)], [Segment(0, 0, 1)]]
    assert wrap([4, 4], 4) == [[Segment(0, 0, 4)], [Segment(1, 0, 4)]]


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_the_packed_layout_computes_what_the_loader_yields(made, fixed_shape):
    dataset, packs = made(fixed_shape=fixed_shape)
    packed = lay_out(dataset).layouts[2]
    computed = [pack["input_ids"].shape[1] for pack in packs]
    assert (packed.num_slots, packed.largest) == (sum(computed), max(computed))
    assert packed.num_microbatches == len(packs) and packed.drawn_slots == computed[0]
    assert packed.num_tokens == sum(pack["num_tokens"] for pack in packs)
    drawn = [segment.length for line in packed.lines for segment in line]
    assert sum(drawn) == packs[0]["num_tokens"]


def test_rows_are_padded_to_the_longest_of_their_microbatch(made):
    dataset, packs = made(shuffle=False)
    found = lay_out(dataset)
    padded, unpadded, _ = found.layouts
    lengths = [int(length) for length in dataset.documents.lengths if length]
    count = found.per_microbatch
    assert count == round(len(lengths) / len(packs))
    batches = [lengths[at : at + count] for at in range(0, len(lengths), count)]
    assert padded.num_slots == sum(len(batch) * max(batch) for batch in batches)
    assert padded.sum_squared_lengths == sum(len(batch) * max(batch) ** 2 for batch in batches)
    assert unpadded.num_slots == unpadded.num_tokens == sum(lengths)
    assert unpadded.sum_squared_lengths == sum(length**2 for length in lengths)
    whole = [sum(batch) for batch in batches[:-1]]
    assert (unpadded.smallest, unpadded.largest) == (min(whole), max(map(sum, batches)))
    assert [line[0].length for line in padded.lines] == batches[0]
    assert padded.line_slots == max(batches[0])


def test_shuffled_microbatches_are_not_the_packs(made):
    """A pack's documents have similar lengths, which would flatter padding."""
    dataset, _ = made()
    drawn = [line[0].length for line in lay_out(dataset).layouts[0].lines]
    plan = dataset.sampler.plan(0)
    assert sorted(drawn) != sorted(dataset.sampler.lengths[plan[0]].tolist())


def test_speeds_follow_from_what_is_computed(made):
    from foundry_ext.preflight.plan.layouts import predict_speeds

    dataset, _ = made()
    layouts = lay_out(dataset)
    model = {"name": "smollm2_packed", "pretrained_model_name_or_path": "smollm2-135m"}
    config = {"model": model, "max_duration": "1ep", "precision": "amp_bf16"}
    config |= {"optimizer": {"name": "decoupled_adamw"}}
    found = predict_speeds(layouts, config, dataset)
    padded, unpadded, packed = found.layouts
    assert padded.speed == 1 and unpadded.speed == packed.speed
    assert packed.speed is not None
    # Nearly all FLOPs are in linears, so the speed is nearly the ratio of the slots.
    assert packed.speed == pytest.approx(padded.num_slots / packed.num_slots, rel=0.15)
    assert "a GPU only" in found.why_no_speed and packed.tokens_per_second is None
    rates = [x.tokens_per_second for x in layouts.with_speeds([1, 2, 2.5], 50.0, "d").layouts]
    assert rates == [20, 40, 50]
    broken = predict_speeds(layouts, {**config, "model": {**model, "name": "other"}}, dataset)
    assert "'other' cannot be planned" in broken.why_no_speed and broken.layouts[0].speed is None


def test_the_page_draws_them(made):
    from foundry_ext.preflight.inspect.packs import Epoch, Inspection
    from foundry_ext.preflight.inspect.page import format_inspection

    dataset, _ = made()
    layouts = lay_out(dataset).with_speeds([1.0, 1.5, 1.5], 30.0, "a device, a <source>")
    epoch = Epoch(9, 9, 9, 9, 9, 1, 512, 160, 9)
    page = format_inspection(Inspection("a", "train", "t", "nothing", epoch, layouts=layouts))
    assert page.count("<svg") == 3 and "a &lt;source&gt;" in page and "<td>1.50</td>" in page
    assert page.count('class="padding"') == len(layouts.layouts[0].lines)
    many = replace(layouts.layouts[0], lines=[[Segment(0, 0, 1)]] * 999)
    page = format_inspection(
        Inspection("a", "train", "t", "nothing", epoch, layouts=replace(layouts, layouts=[many]))
    )
    assert "the first 200 of 999 lines" in page and page.count('class="d0"') == 200
