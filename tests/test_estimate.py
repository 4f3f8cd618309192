"""Restore times and host forms from measured rates: the model, the rule, and what is learned.

Everything here is arithmetic on made-up machines; nothing is measured.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer import estimate
from packer.estimate import (
    FIRST_RATES,
    FIXED_MS,
    BadRates,
    DecodeRates,
    History,
    Learned,
    Mix,
    Rates,
    RestoreShape,
    choose_host_form,
    disk_shape,
    dump_rates,
    expect_fill,
    expect_ms,
    guess_mix,
    host_shape,
    know_copies,
    know_shape,
    load_rates,
    named_rates,
    note_restore,
    reads_past_cache,
    recalibrate,
    restore_stages,
)
from packer.types import GIB, MIB, HostForm, HostSizes, Tier

G = 1_000_000_000
# Two cores: 1.2 GB/s disk, 2.4 GB/s decoding, memory several times that.
RATES = Rates(
    disk_direct=1_200_000_000,
    disk_cached=8 * G,
    disk_write=1 * G,
    memcpy=16 * G,
    memcpy_1=9 * G,
    populate=18 * G,
    map_in=20 * G,
    segment_write=3 * G,
    open=10 * G,
    sha256_1=1_500_000_000,
    bf16=DecodeRates(10 * G, 6 * G, 4_500_000_000, 1_400_000_000),
    fp32=DecodeRates(12 * G, 7 * G, 5_500_000_000, 1_400_000_000),
    other=DecodeRates(4 * G, 16 * G, 4 * G, 1_400_000_000),
    link=0,
    device_copy=0,
    threads=2,
    cores=2,
    measured_ms=1,
)
rate = st.integers(min_value=10**6, max_value=10**12)
decode_rates = st.builds(
    DecodeRates, stored_to_wire=rate, wire_to_final=rate, stored_to_final=rate, encode=rate
)
any_rates = st.builds(
    Rates,
    **{name: rate for name in estimate._PLAIN},
    **{name: decode_rates for name in ("bf16", "fp32", "other")},
    threads=st.integers(1, 4),
    cores=st.integers(1, 256),
)
any_mix = st.builds(
    Mix,
    bf16_bytes=st.integers(MIB, 64 * GIB),
    fp32_bytes=st.integers(0, 64 * GIB),
    other_bytes=st.integers(0, 64 * GIB),
)


def shapes(mix: Mix, on_cuda: bool = False) -> list[RestoreShape]:
    """Every way in which weights like these can come back."""
    nbytes = mix.bf16_bytes + mix.fp32_bytes + mix.other_bytes
    return [
        *(host_shape(mix, form, on_cuda) for form in HostForm),
        *(disk_shape(mix, cached, on_cuda) for cached in (True, False)),
        *(
            RestoreShape(Tier.ORIGIN, nbytes, nbytes, mix, cached=cached, remote=remote, on_cuda=on_cuda)
            for cached in (True, False)
            for remote in (True, False)
        ),
    ]


any_shape = st.builds(
    lambda mix, on_cuda, index: shapes(mix, on_cuda)[index], any_mix, st.booleans(), st.integers(0, 8)
)


def by_rates_ms(rates: Rates, shape: RestoreShape) -> int:
    """Of one whole restore, from the rates alone."""
    return FIXED_MS + round(restore_stages(rates, shape).moving_ms)


# --- the model ------------------------------------------------------------------------------------


def test_a_cold_pack_is_read_at_the_disks_pace() -> None:
    shape = disk_shape(Mix(bf16_bytes=2 * G), cached=False)
    stages = restore_stages(RATES, shape)
    assert stages.limit == "read"
    assert by_rates_ms(RATES, shape) == FIXED_MS + round(2000 * 0.667 / 1.2)


def test_a_cached_pack_is_limited_by_the_cores_whose_work_adds_up() -> None:
    shape = disk_shape(Mix(bf16_bytes=2 * G), cached=True)
    stages = restore_stages(RATES, shape)
    stored_g = 2 * 0.667
    expected_s = 2 / 18 + stored_g / 10 + 2 / 4.5 + stored_g / 8
    assert stages.limit == "cores"
    assert stages.cores_ms == pytest.approx(expected_s * 1000)


def test_a_host_segment_made_on_the_way_is_work_for_the_cores() -> None:
    shape = disk_shape(Mix(bf16_bytes=2 * G), cached=True)
    filling = restore_stages(RATES, replace(shape, fill_bytes=3 * G)).cores_ms
    assert filling == pytest.approx(restore_stages(RATES, shape).cores_ms + 1000)


def test_a_gpu_is_limited_by_the_copy_of_the_wire_form() -> None:
    rates = replace(RATES, device_copy=10 * G, memcpy=40 * G, map_in=80 * G)
    stages = restore_stages(rates, host_shape(Mix(bf16_bytes=16 * G), HostForm.WIRE, on_cuda=True))
    assert stages.limit == "device"
    assert stages.device_ms == pytest.approx(16 * 0.75 / 10 * 1000)
    raw = restore_stages(rates, host_shape(Mix(bf16_bytes=16 * G), HostForm.RAW, on_cuda=True))
    assert raw.device_ms == pytest.approx(1600)


def test_a_remote_origin_is_limited_by_the_line_and_an_unknown_line_is_slow() -> None:
    shape = RestoreShape(Tier.ORIGIN, 2 * G, 2 * G, Mix(bf16_bytes=2 * G), remote=True)
    assert by_rates_ms(replace(RATES, link=1 * G), shape) == FIXED_MS + 2000
    assert by_rates_ms(RATES, shape) == FIXED_MS + 20_000


def test_nothing_is_waited_for_from_the_device() -> None:
    shape = RestoreShape(Tier.DEVICE, GIB, GIB, Mix(bf16_bytes=GIB))
    assert restore_stages(RATES, shape).moving_ms == 0
    assert expect_ms(Learned(), History(), Tier.DEVICE, GIB) == 0


@given(any_rates, any_shape)
def test_a_restore_takes_at_least_its_slowest_stage_and_never_nothing(
    rates: Rates, shape: RestoreShape
) -> None:
    stages = restore_stages(rates, shape)
    assert stages.moving_ms == max(stages.read_ms, stages.cores_ms, stages.device_ms) > 0
    assert getattr(stages, f"{stages.limit}_ms") == stages.moving_ms
    assert by_rates_ms(rates, shape) >= FIXED_MS


@given(any_rates, any_shape, st.sampled_from(sorted(named_rates(FIRST_RATES))), st.integers(2, 50))
def test_a_faster_part_never_makes_a_restore_slower(
    rates: Rates, shape: RestoreShape, name: str, times: int
) -> None:
    family, _, step = name.partition("_")
    if family in ("bf16", "fp32", "other"):
        decode = getattr(rates, family)
        faster = replace(rates, **{family: replace(decode, **{step: getattr(decode, step) * times})})
    else:
        faster = replace(rates, **{name: getattr(rates, name) * times})
    assert by_rates_ms(faster, shape) <= by_rates_ms(rates, shape)


@given(any_rates, any_mix, st.booleans(), st.integers(2, 9))
def test_more_bytes_take_longer_in_proportion(rates: Rates, mix: Mix, on_cuda: bool, times: int) -> None:
    more = Mix(mix.bf16_bytes * times, mix.fp32_bytes * times, mix.other_bytes * times)
    for one, many in zip(shapes(mix, on_cuda), shapes(more, on_cuda), strict=True):
        expected_ms = restore_stages(rates, one).moving_ms * times
        assert restore_stages(rates, many).moving_ms == pytest.approx(expected_ms, rel=1e-6, abs=1e-3)


def test_the_family_follows_from_a_packs_size() -> None:
    assert guess_mix(1000, 667) == Mix(bf16_bytes=1000)
    assert guess_mix(1000, 833) == Mix(fp32_bytes=1000)
    assert guess_mix(1000, 913) == Mix(other_bytes=1000)
    assert guess_mix(0, 0) == Mix()


def test_host_sizes_by_form() -> None:
    sizes = HostSizes(2, 3, 4)
    assert [sizes.of(form) for form in (HostForm.STORED, HostForm.WIRE, HostForm.RAW)] == [2, 3, 4]


# --- the host form --------------------------------------------------------------------------------


def test_a_gpu_gets_the_wire_form_whatever_the_rates() -> None:
    assert choose_host_form(RATES, on_cuda=True) is HostForm.WIRE


def test_a_cpu_gets_raw_while_decoding_is_slow_and_the_smallest_as_soon_as_it_hardly_costs() -> None:
    assert choose_host_form(RATES) is HostForm.RAW
    wire = replace(RATES, bf16=replace(RATES.bf16, wire_to_final=20 * G))
    assert choose_host_form(wire) is HostForm.WIRE
    stored = replace(RATES, bf16=replace(RATES.bf16, stored_to_final=40 * G))
    assert choose_host_form(stored) is HostForm.STORED


def test_a_segment_that_is_mapped_is_worth_its_bytes_unless_it_keeps_too_much_on_a_slow_disk() -> None:
    """Mapping is next to free. On a fast disk that outweighs every miss; on a slow one misses count."""
    mapped = replace(RATES, map_image=200 * G, disk_direct=4 * G)
    for share in (0.5, 1.0, 2.0):
        assert choose_host_form(mapped, host_share=share) is HostForm.RAW
    slow = replace(mapped, disk_direct=G // 10)
    assert choose_host_form(slow, host_share=2.0) is HostForm.RAW
    assert choose_host_form(slow, host_share=0.3) is HostForm.STORED


def test_a_mapped_image_costs_neither_copy_nor_pages_and_filling_its_segment_nothing() -> None:
    mapped = replace(RATES, map_image=200 * G)
    shape = host_shape(Mix(bf16_bytes=2 * G), HostForm.RAW)
    assert restore_stages(mapped, shape).moving_ms == 10
    assert restore_stages(RATES, shape).moving_ms > 200
    disk = disk_shape(Mix(bf16_bytes=2 * G), cached=True)
    filling = replace(disk, form=HostForm.RAW, fill_bytes=2 * G)
    assert restore_stages(mapped, filling) == restore_stages(mapped, disk)
    assert restore_stages(RATES, filling).cores_ms > restore_stages(RATES, disk).cores_ms + 600
    on_cuda = replace(filling, on_cuda=True)
    assert restore_stages(mapped, on_cuda) == restore_stages(RATES, on_cuda)


@given(any_rates, any_mix, st.floats(0.0, 4.0))
def test_the_chosen_form_is_the_smallest_with_which_models_come_nearly_as_fast_as_they_can(
    rates: Rates, mix: Mix, share: float
) -> None:
    chosen = choose_host_form(rates, mix=mix, host_share=share)
    disk_ms = restore_stages(rates, disk_shape(mix, cached=False)).moving_ms
    taken = {}
    for form in HostForm:
        shape = host_shape(mix, form)
        hits = min(1.0, share * shape.image_bytes / max(shape.stored_bytes, 1))
        taken[form] = hits * restore_stages(rates, shape).moving_ms + (1 - hits) * disk_ms
    fastest_ms = min(taken.values())
    assert taken[chosen] * estimate.FORM_RATE_SHARE_MIN <= fastest_ms
    smaller = list(HostForm)[: list(HostForm).index(chosen)]
    assert all(taken[form] * estimate.FORM_RATE_SHARE_MIN > fastest_ms for form in smaller)


def test_cached_packs_are_read_past_the_cache_only_where_a_measured_disk_keeps_up_with_the_cores() -> None:
    fast = replace(RATES, disk_direct=3 * G, disk_cached=3 * G)
    mix = Mix(bf16_bytes=2 * G)
    shapes = (disk_shape(mix, cached=False), disk_shape(mix, cached=True))
    past, through = (restore_stages(fast, shape) for shape in shapes)
    # The disk would be done first: what is left are the cores, and they need not copy.
    assert past.limit == "cores"
    assert past.cores_ms < through.cores_ms * estimate.PAST_CACHE_SHARE_MAX
    assert reads_past_cache(fast)
    assert not reads_past_cache(replace(fast, disk_direct=G // 2))
    # Nearly the same is not worth a disk that others may want.
    assert not reads_past_cache(replace(fast, disk_cached=30 * G))
    assert not reads_past_cache(replace(fast, measured_ms=0))
    assert not reads_past_cache(None)


# --- stored and received --------------------------------------------------------------------------


@given(any_rates)
def test_rates_survive_being_stored(rates: Rates) -> None:
    assert load_rates(dump_rates(rates)) == rates


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"disk_direct": 1}',
        dump_rates(RATES).replace('"memcpy":16000000000', '"memcpy":0'),
        dump_rates(RATES).replace('"memcpy":16000000000', '"memcpy":-5'),
        dump_rates(RATES).replace('"memcpy":16000000000', '"memcpy":1e99'),
        dump_rates(RATES).replace('"memcpy":16000000000', '"memcpy":999999999999999999'),
        dump_rates(RATES).replace('"stored_to_wire":4000000000', '"stored_to_wire":0'),
        dump_rates(RATES).replace('"threads":2', '"threads":0'),
        dump_rates(RATES).replace('"cores":2', '"cores":-1'),
        dump_rates(RATES) + " " * estimate.RATES_BYTES_MAX,
        '{"bf16":' * 5000,
    ],
)
def test_rates_from_outside_are_checked(text: str) -> None:
    with pytest.raises(BadRates, match="calibration"):
        load_rates(text)


def test_what_is_assumed_before_measuring_is_slow_and_valid() -> None:
    assert load_rates(dump_rates(FIRST_RATES)) == FIRST_RATES
    for shape in shapes(Mix(bf16_bytes=2 * G)):
        if not shape.remote:
            assert by_rates_ms(FIRST_RATES, shape) > by_rates_ms(RATES, shape)


def test_every_rate_has_a_name() -> None:
    named = named_rates(RATES)
    assert named["bf16_stored_to_final"] == 4_500_000_000
    assert named["disk_direct"] == 1_200_000_000
    assert len(named) == 13 + 3 * 4


# --- learning -------------------------------------------------------------------------------------

SHAPE = disk_shape(Mix(bf16_bytes=2 * G), cached=False)


def known(shape: RestoreShape = SHAPE) -> History:
    history = History()
    know_shape(history, shape)
    return history


def test_without_any_restore_the_calibration_is_the_estimate() -> None:
    assert expect_ms(Learned(RATES), known(), Tier.DISK, 2 * G) == by_rates_ms(RATES, SHAPE)


def test_without_a_shape_the_usual_is_assumed() -> None:
    for tier in (Tier.HOST, Tier.DISK, Tier.ORIGIN):
        assert 20 < expect_ms(Learned(RATES), History(), tier, 2 * G) < 60_000


def test_what_came_late_on_a_busy_machine_is_not_expected_again() -> None:
    """Being late by chance is common and far; an estimate that follows it is off for every other restore."""
    learned, history = Learned(RATES), known()
    for restore_ms in (1500, 9000, 1520, 8000, 7000):
        note_restore(learned, history, Tier.DISK, 2 * G, restore_ms)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(1520, rel=0.01)


def test_restores_of_another_form_do_not_count_once_there_are_some_of_this_one() -> None:
    learned, history = Learned(RATES), known()
    wire, raw = (host_shape(Mix(bf16_bytes=2 * G), form) for form in (HostForm.WIRE, HostForm.RAW))
    know_shape(history, wire)
    for _ in range(4):
        note_restore(learned, history, Tier.HOST, 2 * G, 4000)
    know_shape(history, raw)
    note_restore(learned, history, Tier.HOST, 2 * G, 30)
    assert expect_ms(learned, history, Tier.HOST, 2 * G) == pytest.approx(30, rel=0.05)


def test_a_models_own_restores_decide_and_two_odd_ones_do_not() -> None:
    learned, history = Learned(RATES), known()
    for restore_ms in (1500, 9000, 1520, 1490, 100):
        note_restore(learned, history, Tier.DISK, 2 * G, restore_ms)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(1500, rel=0.01)


def test_a_part_of_a_model_takes_its_part_of_the_time() -> None:
    learned, history = Learned(RATES), known()
    note_restore(learned, history, Tier.DISK, 2 * G, 2 * by_rates_ms(RATES, SHAPE))
    moving_ms = restore_stages(RATES, SHAPE).moving_ms
    assert expect_ms(learned, history, Tier.DISK, G // 2) == pytest.approx(
        2 * (FIXED_MS + moving_ms / 4), abs=1
    )
    # And the other way round: a quarter that was restored says what all of it will take.
    learned, history = Learned(RATES), known()
    note_restore(learned, history, Tier.DISK, G // 2, round(3 * (FIXED_MS + moving_ms / 4)))
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(
        3 * (FIXED_MS + moving_ms), rel=0.01
    )


def test_another_model_is_expected_to_be_off_by_as_much_as_this_nodes_others() -> None:
    learned = Learned(RATES)
    moving_ms = restore_stages(RATES, SHAPE).moving_ms
    for _ in range(3):
        note_restore(learned, known(), Tier.DISK, 2 * G, round(FIXED_MS + 1.5 * moving_ms))
    assert expect_ms(learned, known(), Tier.DISK, 2 * G) == pytest.approx(FIXED_MS + 1.5 * moving_ms, abs=2)
    # Another tier is not concerned.
    host = host_shape(Mix(bf16_bytes=2 * G), HostForm.RAW)
    assert expect_ms(learned, known(host), Tier.HOST, 2 * G) == by_rates_ms(RATES, host)


def test_small_restores_say_what_the_fixed_part_is_and_nothing_about_speed() -> None:
    learned = Learned(RATES)
    small = disk_shape(Mix(bf16_bytes=MIB), cached=False)
    for _ in range(5):
        note_restore(learned, known(small), Tier.DISK, MIB, 5)
    assert expect_ms(learned, known(small), Tier.DISK, MIB) in (4, 5, 6)
    big_ms = expect_ms(learned, known(), Tier.DISK, 2 * G)
    assert big_ms == pytest.approx(restore_stages(RATES, SHAPE).moving_ms + 5, abs=2)


def test_own_factor_does_not_move_when_the_nodes_fixed_part_does() -> None:
    """The factor was seen against one fixed part; used against another it would be off."""
    learned, history = Learned(RATES), known(disk_shape(Mix(bf16_bytes=MIB), cached=False))
    note_restore(learned, history, Tier.DISK, MIB, 10)
    before_ms = expect_ms(learned, history, Tier.DISK, MIB)
    for _ in range(9):
        note_restore(learned, known(disk_shape(Mix(bf16_bytes=MIB), cached=False)), Tier.DISK, MIB, 200)
    assert expect_ms(learned, history, Tier.DISK, MIB) == before_ms == 10


def test_new_rates_keep_what_a_model_took() -> None:
    learned, history = Learned(), known()
    for _ in range(3):
        note_restore(learned, history, Tier.DISK, 2 * G, 1500)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(1500, abs=1)
    recalibrate(learned, RATES)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(1500, abs=1)
    # The tier's factor was against the old rates and is gone.
    assert expect_ms(learned, known(), Tier.DISK, 2 * G) == by_rates_ms(RATES, SHAPE)
    epoch = learned.epoch
    recalibrate(learned, RATES)
    assert learned.epoch == epoch


def test_a_cached_and_a_cold_file_are_told_apart() -> None:
    learned, history = Learned(RATES), known()
    warm = replace(SHAPE, cached=True)
    cold_ms, warm_ms = by_rates_ms(RATES, SHAPE), by_rates_ms(RATES, warm)
    note_restore(learned, history, Tier.DISK, 2 * G, round(cold_ms * 1.1), cached=False)
    note_restore(learned, history, Tier.DISK, 2 * G, round(warm_ms * 1.2), cached=True)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(warm_ms * 1.2, rel=0.01)
    note_restore(learned, history, Tier.DISK, 2 * G, round(cold_ms * 1.1), cached=False)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(cold_ms * 1.1, rel=0.01)
    # A restore that fills a host segment is another one than those that did not.
    expect_fill(history, Tier.DISK, G)
    filling_ms = expect_ms(learned, history, Tier.DISK, 2 * G)
    note_restore(learned, history, Tier.DISK, 2 * G, 5 * filling_ms, cached=False)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(5 * filling_ms, rel=0.01)
    expect_fill(history, Tier.DISK, 0)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) == pytest.approx(cold_ms * 1.1, rel=0.01)
    # A new pack of the same model keeps what was last seen.
    know_shape(history, replace(SHAPE, cached=True))
    assert not history.shapes[Tier.DISK].cached


def test_copies_are_known_by_their_sizes_and_one_that_is_gone_leaves_its_shape() -> None:
    learned, history = Learned(RATES, host_form=HostForm.WIRE), History()
    sizes = {"image_bytes": 1000, "disk_bytes": 833, "host_bytes": 875}
    know_copies(learned, history, **sizes, remote=False, cached=True)
    disk = RestoreShape(Tier.DISK, 1000, 833, Mix(fp32_bytes=1000), HostForm.WIRE, cached=True)
    assert history.shapes[Tier.DISK] == disk
    assert history.shapes[Tier.HOST].form is HostForm.WIRE
    assert history.shapes[Tier.HOST].stored_bytes == 875
    assert not history.shapes[Tier.ORIGIN].remote
    know_copies(learned, history, image_bytes=1000, disk_bytes=0, host_bytes=0, remote=True)
    assert set(history.shapes) == {Tier.HOST, Tier.DISK, Tier.ORIGIN}
    assert history.shapes[Tier.ORIGIN].remote
    assert history.shapes[Tier.DISK].cached
    # A version of which nothing is known but its name has no shape.
    empty = History()
    know_copies(learned, empty, image_bytes=0, disk_bytes=833, host_bytes=875, remote=False)
    assert not empty.shapes


def test_a_stall_and_a_broken_clock_stay_within_bounds() -> None:
    learned, history = Learned(RATES), known()
    note_restore(learned, history, Tier.DISK, 2 * G, 10**12)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) <= by_rates_ms(RATES, SHAPE) * 32 + 1
    history = known()
    note_restore(learned, history, Tier.DISK, 2 * G, -5)
    assert expect_ms(learned, history, Tier.DISK, 2 * G) >= 1


def test_what_is_remembered_is_bounded() -> None:
    learned, history = Learned(RATES), known()
    for number in range(100):
        note_restore(learned, history, Tier.DISK, 2 * G, 1000 + number)
        note_restore(learned, history, Tier.HOST, MIB, 10 + number)
    assert {len(each) for each in history.samples.values()} == {estimate.SAMPLES_MAX}
    assert len(learned.factors[Tier.DISK]) == len(learned.fixed_ms[Tier.HOST]) == estimate.TIER_SAMPLES_MAX


@given(
    any_rates,
    any_shape,
    st.lists(st.integers(60, 10**6), min_size=1, max_size=8),
    st.floats(0.05, 1.0),
)
def test_estimates_are_positive_and_within_what_was_seen(
    rates: Rates, shape: RestoreShape, taken_ms: list[int], share: float
) -> None:
    learned, history = Learned(rates), known(shape)
    for restore_ms in taken_ms:
        note_restore(learned, history, shape.tier, shape.image_bytes, restore_ms)
    whole_ms = expect_ms(learned, history, shape.tier, shape.image_bytes)
    predicted_ms = by_rates_ms(rates, shape)
    low, high = min(taken_ms[-5:]), max(taken_ms[-5:])
    assert min(low, predicted_ms / 40) - 2 <= whole_ms <= max(high, predicted_ms * 40) + 2
    assert 1 <= expect_ms(learned, history, shape.tier, round(shape.image_bytes * share)) <= whole_ms + 1


@given(st.lists(st.floats(0.95, 1.05), min_size=6, max_size=40), st.floats(0.3, 3.0), any_shape)
def test_on_a_quiet_machine_the_error_stays_within_15_percent(
    noise: list[float], off: float, shape: RestoreShape
) -> None:
    """However far the calibration is off: after three restores every one is predicted."""
    learned, history = Learned(RATES), known(shape)
    base_ms = 200 + by_rates_ms(RATES, shape) * off
    for number, factor in enumerate(noise):
        real_ms = base_ms * factor
        if number >= 3:
            predicted_ms = expect_ms(learned, history, shape.tier, shape.image_bytes)
            assert abs(predicted_ms - real_ms) <= 0.15 * real_ms + 1
        note_restore(learned, history, shape.tier, shape.image_bytes, round(real_ms))
