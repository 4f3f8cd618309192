"""Pack files that several versions have extents in: who holds them, who pays, and when they go.

Covers: real files and a real journal, packs written with what is offered to them, drops in any order, a
start after a crash at any moment of a drop, charges against what is really on disk, and what is offered to
whom. Does not cover: workers and orders (``test_orders_sharing``), the pack format (``test_bases``).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from base_samples import version_of
from pack_samples import SIDE, image_of, read_image

from agent import holdings as holdings_module
from agent.holdings import Holdings, Offers
from agent.journal import PackRow, open_journal
from agent.journal_thread import JournalThread
from agent.pack_making import PackMaking
from agent.packs import PackDirectory
from agent.workers import PackDone
from packer.bases import BasePack, Bases
from packer.holes import holes, punch, ranges_in
from packer.layout import ImageLayout
from packer.pack import PackReader
from packer.pack_file import FileFds
from packer.pack_writer import PackWriter
from packer.types import MIB, HostForm, HostSizes, ModelRef, ModelSpec, OriginFile, Task

Model = tuple[bytes, ImageLayout]


def ref(number: int, name: str = "tiny", tenant: str = "acme") -> ModelRef:
    return ModelRef(tenant, name, f"{number:016x}")


@dataclass
class Shop:
    """A data directory, and what should be in it."""

    folder: Path
    packs: PackDirectory
    journal: JournalThread
    holdings: Holdings
    specs: dict[ModelRef, ModelSpec] = field(default_factory=dict)
    models: dict[ModelRef, Model] = field(default_factory=dict)

    def register(self, whose: ModelRef, model: Model, weights_sha256: str | None = None) -> ModelSpec:
        layout = model[1]
        files = (OriginFile("model.safetensors", len(model[0]), weights_sha256 or str(whose)),)
        spec = ModelSpec(
            whose, "", files, "e", Task.EMBEDDING, layout.image_bytes, layout.chunk_bytes, 0, 0, latest=False
        )
        self.specs[whose] = spec
        return spec

    async def offer(self, whose: ModelRef, model: Model) -> Offers | None:
        return await self.holdings.offer(self.register(whose, model))

    async def write(self, whose: ModelRef, model: Model, offers: Offers | None) -> PackDone:
        """As a worker does it, up to the answer that the agent gets."""
        key, wrapped = await self.journal.call(self.journal.journal.seal_partial_key, whose, 1)
        descriptor, part = self.packs.create_partial(whose, False)
        os.close(part)
        offered = [
            BasePack(pack.ref, pack.data_key, FileFds(pack.fds[0]), tuple(map(FileFds, pack.fds[1:])))
            for pack in (offers.packs if offers is not None else ())
        ]
        layout, image = model[1], memoryview(image_of(*model))
        bases = Bases(offered, whose)
        writer = PackWriter(descriptor, whose, "e", Task.EMBEDDING, layout, key, 64 * MIB, bases=bases)
        for path, data in SIDE.items():
            writer.add_file(path, data)
        for number, span in enumerate(layout.chunks):
            writer.add_chunk(number, image[span.image_offset : span.image_offset + span.nbytes])
        summary = writer.finish()
        os.close(descriptor)
        done = PackDone(summary.disk_bytes, summary.host, summary.deduplicated_bytes, summary.bases)
        self.packs.publish(whose, holdings_module.base_paths(done, offers))
        row = PackRow(whose, done.disk_bytes, 1, None, done.deduplicated_bytes)
        await self.journal.call(self.journal.journal.add_pack, row, wrapped, len(self.models))
        self.packs.abandon(whose)
        return done

    async def make(self, whose: ModelRef, *seeds: int) -> PackDone:
        model = version_of(*seeds)
        offers = await self.offer(whose, model)
        done = await self.write(whose, model, offers)
        self.holdings.add(whose, done.disk_bytes, done.deduplicated_bytes)
        await self.holdings.release(offers)
        self.models[whose] = model
        return done

    async def drop(self, whose: ModelRef) -> dict[ModelRef, int]:
        await self.holdings.prepare_drop(whose)
        await self.journal.call(self.journal.journal.remove_pack, whose)
        charged = await self.holdings.drop(whose)
        del self.models[whose]
        return dict(charged)

    async def restart(self) -> None:
        """The same directory as a new agent finds it."""
        self.holdings = Holdings(self.packs, self.journal, lambda whose: self.specs[whose])
        rows = await self.journal.call(self.journal.journal.packs)
        await self.holdings.find(rows, ())
        self.packs.sweep([row.ref for row in rows])

    def used_bytes(self) -> int:
        """What the directory takes on disk, each file once."""
        states = {path.stat().st_ino: path.stat() for path in self.folder.rglob("*.pack*")}
        return sum(min(state.st_size, 512 * state.st_blocks) for state in states.values())

    def charges(self) -> dict[ModelRef, int]:
        return {whose: self.holdings.charge(whose) for whose in self.models}

    async def check(self) -> None:
        """Every pack restores bit by bit, and everything on disk is on somebody's account."""
        for whose, model in self.models.items():
            key = await self.journal.call(self.journal.journal.data_key, whose)
            with ExitStack() as files:
                descriptor = self.packs.open(whose)
                files.callback(os.close, descriptor)
                reader = PackReader(descriptor, key, whose, bases=self.packs.open_bases(whose, files))
                assert read_image(reader) == image_of(*model)
        charged = sum(self.charges().values())
        assert self.used_bytes() <= charged
        # Nor is anybody charged for what is not there, but for the rounding of blocks.
        assert charged <= self.used_bytes() + MIB // 4


@pytest_asyncio.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    packs, journal = PackDirectory(tmp_path / "packs"), JournalThread(open_journal(tmp_path))
    specs: dict[ModelRef, ModelSpec] = {}
    shop = Shop(
        tmp_path / "packs", packs, journal, Holdings(packs, journal, lambda whose: specs[whose]), specs
    )
    with (tmp_path / "probe").open("w+b") as probe:
        probe.write(bytes(2 * MIB))
        probe.flush()
        if not punch(probe.fileno(), holes([], 2 * MIB)):
            pytest.skip("this file system can not punch holes")
    yield shop
    journal.close()


async def test_a_base_goes_and_what_others_need_of_it_stays(shop: Shop) -> None:
    first = await shop.make(ref(1), 1, 2, 3, 4)
    second = await shop.make(ref(2), 1, 2, 3, 9)
    assert first.disk_bytes > 2 * MIB
    assert second.disk_bytes < MIB
    assert shop.charges() == {ref(1): first.disk_bytes, ref(2): second.disk_bytes}
    assert shop.holdings.deduplicated_bytes(ref(2)) >= 3 * MIB
    charged = await shop.drop(ref(1))
    # Three of four chunks stay; the fourth, the side files and the index are given back.
    assert list(charged) == [ref(2)]
    kept_bytes = charged[ref(2)] - second.disk_bytes
    assert 0.7 * first.disk_bytes < kept_bytes < 0.8 * first.disk_bytes
    await shop.check()
    await shop.restart()
    assert shop.charges() == charged
    await shop.check()
    assert await shop.drop(ref(2)) == {}
    assert shop.used_bytes() == 0
    assert not list(shop.folder.rglob("*.pack*"))


async def test_a_third_version_pays_when_the_second_goes_too(shop: Shop) -> None:
    """And what only the second needed is given back then."""
    await shop.make(ref(1), 1, 2, 3, 4)
    second = await shop.make(ref(2), 1, 2, 8, 9)
    third = await shop.make(ref(3), 1, 8, 7, 6)
    assert len(third.bases) == 2
    charged = await shop.drop(ref(1))
    assert list(charged) == [ref(2)]
    before_bytes = shop.used_bytes()
    charged = await shop.drop(ref(2))
    # One chunk of the first file and one of the second.
    assert list(charged) == [ref(3)]
    assert shop.used_bytes() < before_bytes - 1.5 * MIB // 2
    assert third.disk_bytes < charged[ref(3)] < third.disk_bytes + 2 * MIB
    await shop.check()
    assert second.deduplicated_bytes


async def test_charges_follow_any_order_of_makes_and_drops(shop: Shop) -> None:
    """After each step everything restores and every byte is charged, also after a restart."""
    draw = random.Random(5)
    shared_seen = retained_seen = 0
    for number in range(60):
        if len(shop.models) < 5 and draw.random() < 0.6:
            done = await shop.make(ref(number), *(draw.randrange(6) for _ in range(draw.randrange(1, 5))))
            shared_seen += bool(done.bases)
        elif shop.models:
            charged = await shop.drop(draw.choice(list(shop.models)))
            retained_seen += bool(charged)
            assert all(shop.holdings.charge(whose) == nbytes for whose, nbytes in charged.items())
        before = shop.charges()
        if draw.random() < 0.3:
            await shop.restart()
            assert sum(shop.charges().values()) == sum(before.values())
        await shop.check()
    assert shared_seen > 10
    assert retained_seen > 5
    for whose in list(shop.models):
        await shop.drop(whose)
    assert shop.used_bytes() == 0


class Killed(BaseException):
    """The agent dies here."""


@pytest.mark.parametrize("calls", range(8))
async def test_a_drop_that_is_cut_off_anywhere_ends_at_the_next_start(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Killed at the n-th change of a file. Then no unneeded byte is left, and none that is needed is gone."""
    await shop.make(ref(1), 1, 2, 3, 4)
    await shop.make(ref(2), 1, 2, 8, 9)
    await shop.make(ref(3), 1, 8, 7, 6)
    await shop.drop(ref(1))
    left = calls

    def counted(real):  # type: ignore[no-untyped-def]
        def call(*arguments, **more):  # type: ignore[no-untyped-def]
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return real(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(holdings_module, "punch", counted(punch))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        try:
            await shop.drop(ref(2))
        except Killed:
            del shop.models[ref(2)]
    await shop.restart()
    assert set(shop.charges()) == {ref(3)}
    await shop.check()
    # As if it had not been killed: one chunk of each of two files beside its own.
    assert shop.used_bytes() < 5 * MIB
    names = sorted(path.name for path in shop.folder.rglob("*.pack*"))
    assert names == [f"tiny@{ref(3).version}.pack{ending}" for ending in ("", ".base-0", ".base-1")]


async def test_a_drop_waits_for_a_pack_that_looks_into_it(shop: Shop) -> None:
    """And no new one begins to, once it waits."""
    await shop.make(ref(1), 1, 2)
    model = version_of(1, 3)
    offers = await shop.offer(ref(2), model)
    assert offers is not None
    dropping = asyncio.create_task(shop.drop(ref(1)))
    done = await shop.write(ref(2), model, offers)
    assert not dropping.done()
    shop.holdings.add(ref(2), done.disk_bytes, done.deduplicated_bytes)
    shop.models[ref(2)] = model
    await shop.holdings.release(offers)
    await shop.holdings.release(offers)  # harmless
    assert list(await dropping) == [ref(2)]
    await shop.check()


async def test_a_pack_that_is_going_is_not_offered(shop: Shop) -> None:
    await shop.make(ref(1), 1, 2)
    await shop.holdings.prepare_drop(ref(1))
    assert await shop.offer(ref(2), version_of(1, 3)) is None


async def test_only_packs_of_the_tenant_are_offered(shop: Shop) -> None:
    """However equal they are, name, shape and bytes."""
    await shop.make(ref(1, tenant="bank"), 1, 2)
    assert await shop.offer(ref(2), version_of(1, 2)) is None
    await shop.make(ref(3), 1, 2)
    offers = await shop.offer(ref(2), version_of(1, 2))
    assert offers is not None
    assert [pack.ref for pack in offers.packs] == [ref(3)]
    await shop.holdings.release(offers)


async def test_the_likeliest_packs_are_offered_first(shop: Shop) -> None:
    """A weight file in common, then the same name, newest first, then the same shape; a few, not all."""
    same_shape = version_of(1, 2)
    for number, (name, seeds) in enumerate(
        [
            ("other", (1, 2, 3)),
            ("shape", (1, 2)),
            ("tiny", (4,)),
            ("tiny", (5,)),
            ("tiny", (6,)),
            ("far", (7,)),
        ]
    ):
        await shop.make(ref(number, name), *seeds)
    shop.register(ref(0, "other"), version_of(1, 2, 3), weights_sha256="common")
    spec = shop.register(ref(9), same_shape, weights_sha256="common")
    offers = await shop.holdings.offer(spec)
    assert offers is not None
    assert [pack.ref for pack in offers.packs] == [
        ref(0, "other"),
        ref(4, "tiny"),
        ref(3, "tiny"),
        ref(2, "tiny"),
    ]
    await shop.holdings.release(offers)
    assert "shape" not in {pack.ref.name for pack in offers.packs}


async def test_a_worker_that_names_files_it_was_not_given_is_not_believed(shop: Shop) -> None:
    await shop.make(ref(1), 1, 2)
    offers = await shop.offer(ref(2), version_of(1, 2))
    assert offers is not None
    salt = next(iter(offers.paths))
    for bases in ((bytes(32),), (salt, salt)):
        with pytest.raises(OSError, match="not offered"):
            holdings_module.base_paths(PackDone(1, HostSizes(1, 1, 1), 0, bases), offers)
    with pytest.raises(OSError, match="not offered"):
        holdings_module.base_paths(PackDone(1, HostSizes(1, 1, 1), 0, (salt,)), None)
    await shop.holdings.release(offers)


async def test_without_a_key_or_holes_the_whole_file_stays_and_is_charged(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await shop.make(ref(1), 1, 2, 3, 4)
    second = await shop.make(ref(2), 1, 5, 6, 7)
    monkeypatch.setattr(holdings_module, "punch", lambda fd, ranges: False)
    assert await shop.drop(ref(1)) == {ref(2): second.disk_bytes + first.disk_bytes}
    await shop.check()


async def test_shredded_tenants_leave_nothing(shop: Shop) -> None:
    """The key goes first, so no pack can be looked into any more; the files go all the same."""
    await shop.make(ref(1), 1, 2, 3)
    await shop.make(ref(2), 1, 2, 4)
    assert await shop.journal.call(shop.journal.journal.shred_tenants, []) == ["acme"]
    await shop.drop(ref(1))
    await shop.drop(ref(2))
    assert shop.used_bytes() == 0


async def test_a_file_system_without_links_shares_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError("no links here")

    await shop.make(ref(1), 1, 2)
    monkeypatch.setattr(os, "link", refuse)
    shop.packs = PackDirectory(shop.folder)
    assert not shop.packs.has_links
    await shop.restart()
    assert (await shop.make(ref(2), 1, 2)).bases == ()
    assert not [path for path in shop.folder.iterdir() if path.name.startswith(".")]


async def test_a_file_that_came_twice_once_in_parts_is_not_taken_for_the_whole(shop: Shop) -> None:
    """Packs of two versions came from other nodes, each with its own copy of a file that both need."""
    await shop.make(ref(1), 1, 2, 3)
    await shop.make(ref(2), 1, 9)
    link = shop.packs.base_path(ref(2), 0)
    whole = link.read_bytes()
    link.unlink()
    link.write_bytes(whole)
    key = await shop.journal.call(shop.journal.journal.data_key, ref(2))
    with shop.packs.path(ref(2)).open("rb") as pack, link.open("r+b") as file:
        index = PackReader(pack.fileno(), key, ref(2), bases=None).index
        # What another node gives of it.
        assert punch(file.fileno(), holes(ranges_in(index, index.bases[0].salt), len(whole)))
    await shop.restart()
    model = version_of(1, 2, 9)
    # The pack in parts is the likelier one; its chunk 1 and the other one's chunk 2 name the same file.
    shop.register(ref(2), shop.models[ref(2)], "common")
    offers = await shop.holdings.offer(shop.register(ref(3), model, "common"))
    assert offers is not None
    assert [pack.ref for pack in offers.packs] == [ref(2)]
    done = await shop.write(ref(3), model, offers)
    shop.holdings.add(ref(3), done.disk_bytes, done.deduplicated_bytes)
    await shop.holdings.release(offers)
    shop.models[ref(3)] = model
    await shop.check()


@pytest.mark.parametrize("stated_bytes", [0, 4095, 4097, 2**49])
async def test_a_pack_is_charged_what_its_file_takes_whatever_the_worker_states(
    stated_bytes: int, shop: Shop
) -> None:
    """More would push other tenants' packs off the disk, less would be disk that nobody pays for."""
    making = PackMaking(shop.packs, shop.journal, shop.holdings, lambda: 1, lambda gone: None)
    spec = shop.register(ref(1), version_of(1, 2))
    begun = await making.begin(spec, MIB)
    os.truncate(begun.fd, 4096)
    sizes = HostSizes(1, 1, 1)
    with pytest.raises(OSError, match="4096"):
        await making.publish(begun, PackDone(stated_bytes, sizes), HostForm.STORED)
    await making.give_up(begun)
    assert shop.holdings.charge(ref(1)) == 0
    assert not list(shop.folder.rglob("*.pack*"))
    begun = await making.begin(spec, MIB)
    os.truncate(begun.fd, 4096)
    await making.publish(begun, PackDone(4096, sizes), HostForm.STORED)
    await making.end(begun)
    assert shop.holdings.charge(ref(1)) == 4096


@pytest.mark.parametrize("broken", ["files", "offers"])
async def test_what_lies_on_disk_of_a_pack_is_known_also_when_it_can_not_be_gone_on_with(
    broken: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more descriptors, or a disk that fails for a moment: the bytes stay on their tenant's account, and a
    later load goes on from them."""
    making = PackMaking(shop.packs, shop.journal, shop.holdings, lambda: 1, lambda gone: None)
    spec = shop.register(ref(1), version_of(1, 2))
    begun = await making.begin(spec, MIB)
    os.truncate(begun.fd, 8192)
    os.truncate(begun.part_fd, 64)
    await making.give_up(begun, keep=True)
    kept_bytes = making.partial_bytes(ref(1))
    assert kept_bytes >= 8192

    def fail(*words: object) -> object:
        raise OSError("too many open files")

    with monkeypatch.context() as patched:
        if broken == "files":
            patched.setattr(PackDirectory, "create_partial", fail)
        else:
            patched.setattr(Holdings, "offer", fail)
        with pytest.raises(OSError, match="open files"):
            await making.begin(spec, MIB)
    assert making.partial_bytes(ref(1)) == kept_bytes
    again = await making.begin(spec, MIB)
    assert again.resumed
    await making.give_up(again)
