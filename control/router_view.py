"""What a router knows of the cluster: words of control's feed, brought into a catalog and the cluster core.

Covers: which answers count, gathering what comes in pieces until it is whole, and taking it up at one time.
Does not cover: asking (``control.router_line``), numbers (``control.feed``), or choosing nodes.

While control is away nothing is taken back: the router goes on with what it knew last. It can say all of it
again in control's words, and be told so: what a router keeps on its disk (``control.kept_view``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import msgspec

from control import cluster as fleet
from control.catalog import Catalog, DropKey, DropModel, DropNode, KeyRow, NodeRow, PutKey, PutModel, PutNode
from control.cluster import Cluster
from control.places import check_url
from control.router_wire import (
    KEY,
    MODEL,
    NO_MORE,
    NODE,
    PLACES,
    KeyTold,
    ModelTold,
    NodeTold,
    Place,
    PlacesTold,
    RouterAnswer,
    Told,
    key_told,
    model_told,
    places_told,
)
from packer.types import BadValue, ModelSpec, parse_ref
from packer.wire import BadMessage, ModelReport, Report, decode, encode


class StaleAnswer(BadMessage):
    """An answer that does not follow on what this router knows; the text says why. Nothing of it counts."""


@dataclass(slots=True)
class _Node:
    """The last word about a node, of both kinds; they come apart. Of one that control has not heard since it
    started, where things are is not said."""

    told: NodeTold
    models: tuple[ModelReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a router knew at one time."""

    epoch: int
    seq: int
    keys: tuple[tuple[KeyRow, int], ...]
    models: tuple[tuple[ModelSpec, int], ...]
    nodes: tuple[tuple[str, NodeTold, tuple[ModelReport, ...]], ...]

    def words(self) -> Iterator[Told]:
        """As control says it. Nothing here changes any more, so that a thread may ask."""
        for row, seq in self.keys:
            yield Told(f"{KEY}/{row.key_id}", msgspec.Raw(key_told(row, seq)))
        for spec, seq in self.models:
            yield Told(f"{MODEL}/{spec.ref}", msgspec.Raw(model_told(spec, seq)))
        for name, told, models in self.nodes:
            yield Told(f"{NODE}/{name}", msgspec.Raw(encode(told)))
            yield Told(f"{PLACES}/{name}", msgspec.Raw(places_told(models)))


class RouterView:
    """``dialled``: a node's URL as this box reaches it."""

    def __init__(
        self,
        catalog: Catalog,
        cluster: Cluster,
        now_ms: Callable[[], int],
        dialled: Callable[[str], str] = lambda url: url,
    ) -> None:
        self._catalog = catalog
        self._cluster = cluster
        self._now_ms = now_ms
        self._dialled = dialled
        self._nodes: dict[str, _Node] = {}
        # By name, what was taken up: a control that was started again says everything anew, and nearly all of
        # it is as it was.
        self._known: dict[str, int] = {}
        self._coming: dict[str, msgspec.Raw] = {}
        self._anew = False  # what is coming is all that there is
        self.have = 0
        self.epoch = 0
        self.start = ""
        self.whole_ms: int | None = None  # when this last was all that control knew
        self.changes = 0  # times that something of it became otherwise
        self.is_kept = False  # it is what was kept, and control has said nothing since

    @property
    def is_ready(self) -> bool:
        """Whether it was ever whole."""
        return self.whole_ms is not None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing of what it has heard."""
        return not self._anew and not self._coming

    def take(self, answer: RouterAnswer) -> None:
        """Raises ``BadMessage``; nothing has changed then."""
        if answer.epoch < self.epoch:
            raise StaleAnswer(f"control's answer is of epoch {answer.epoch}, this router knows {self.epoch}")
        # Numbers are of one start; its epoch rises when it overtakes what nodes have seen.
        follows = (answer.start, answer.base) == (self.start, self.have)
        if answer.base and not follows:
            raise StaleAnswer("control's answer follows on what this router does not have")
        if answer.number < answer.base:
            raise StaleAnswer("control's answer goes back")
        words = {word.name: word.text for word in answer.words}
        if not answer.base:
            self._coming, self._anew = words, True
        else:
            self._coming.update(words)
        self.start, self.epoch, self.have = answer.start, answer.epoch, answer.number
        if answer.more:
            return
        coming, anew = self._coming, self._anew
        self._coming, self._anew = {}, False
        try:
            taken = _Taken(coming, self._known)
        except BadMessage:
            self.have = 0  # all of it again
            raise
        fleet.step(self._cluster, fleet.Changed(answer.epoch, answer.seq), self._now_ms())
        self._take_up(taken, anew)
        self.whole_ms, self.is_kept = self._now_ms(), False
        self.changes += bool(coming)

    def take_kept(self, words: Sequence[Told], epoch: int, seq: int, age_ms: int) -> None:
        """What this router knew before it was started, so long ago, while it knows nothing else. Control is
        asked for all of it again. Raises ``BadMessage``; nothing has changed then."""
        taken = _Taken({word.name: word.text for word in words}, {})
        self.epoch = max(self.epoch, epoch)  # as if it had not been stopped: an older control is overtaken
        fleet.step(self._cluster, fleet.Changed(epoch, seq), self._now_ms())
        self._take_up(taken, anew=False)
        self.whole_ms, self.is_kept = self._now_ms() - age_ms, True

    def snapshot(self) -> Snapshot:
        catalog = self._catalog
        return Snapshot(
            *self._cluster.newest,
            tuple((row, catalog.key_seq.get(key_id, 0)) for key_id, row in catalog.keys.items()),
            tuple((spec, catalog.model_seq.get(ref, 0)) for ref, spec in catalog.models.items()),
            tuple((name, self._last_told(name, node), node.models) for name, node in self._nodes.items()),
        )

    def _last_told(self, name: str, node: _Node) -> NodeTold:
        """With what a control that was started again has not said yet, and the one before it had."""
        view = self._cluster.nodes[name]
        if node.told.heard or view.report is None:
            return node.told
        return replace(
            node.told,
            heard=True,
            draining=view.report.draining,
            have_epoch=view.have[0],
            have_seq=view.have[1],
            load=view.load_said,
            devices=view.report.devices,
        )

    def lose_place(self) -> None:
        """Ask for all of it again."""
        self.have, self._coming, self._anew = 0, {}, False

    def lose_pieces(self) -> None:
        """What came in pieces is not whole, and the rest may never come: all of it again."""
        if self._coming:
            self.lose_place()

    # --- one whole change -------------------------------------------------------------------------

    def _take_up(self, taken: _Taken, anew: bool) -> None:
        catalog = self._catalog
        if anew:
            named = taken.known
            taken.gone += [name for name in self._known if name not in named and not name.startswith(PLACES)]
        for name in taken.gone:
            self._drop(name)
        self._known |= taken.known
        for key_id, key in taken.keys.items():
            row = KeyRow(key_id, key.secret_sha256, key.tenant, "", 0, key.expires_ms)
            catalog.apply(PutKey(row), key.seq)
        for model in taken.models.values():
            catalog.apply(PutModel(model.spec), model.seq)
        for node in dict.fromkeys((*taken.nodes, *taken.places)):
            self._put_node(node, taken)

    def _drop(self, name: str) -> None:
        self._known.pop(name, None)
        kind, _, rest = name.partition("/")
        if kind == KEY:
            self._catalog.apply(DropKey(rest), 0)
        elif kind == MODEL:
            with suppress(BadValue):
                self._catalog.apply(DropModel(parse_ref(rest)), 0)
        elif kind == NODE:
            self._nodes.pop(rest, None)
            self._known.pop(f"{PLACES}/{rest}", None)
            self._catalog.apply(DropNode(rest), 0)
            fleet.step(self._cluster, fleet.NodeRemoved(rest), self._now_ms())

    def _put_node(self, name: str, taken: _Taken) -> None:
        known = self._nodes.get(name)
        told = taken.nodes.get(name) or (known.told if known is not None else None)
        if told is None:
            return  # where things are on a node that nobody told of
        places = taken.places.get(name)
        models = known.models if known is not None else ()
        if places is not None:
            models = tuple(_model(place) for place in places.models)
        self._nodes[name] = node = _Node(told, models)
        self._catalog.apply(PutNode(NodeRow(name, "", told.key_sha256, told.gateway_url, 0)), 0)
        now_ms = self._now_ms()
        fleet.step(self._cluster, fleet.NodeJoined(name, told.gateway_url), now_ms)
        report = self._report(node) if told.heard else None
        event = fleet.NodeTold(
            name, report, told.have_epoch, told.have_seq, told.load, told.silent, told.cloned
        )
        fleet.step(self._cluster, event, now_ms)

    def _report(self, node: _Node) -> Report:
        told = node.told
        return Report(
            gateway_url=self._url(told.gateway_url),
            started_ms=0,
            draining=told.draining,
            devices=told.devices,
            host_budget_bytes=0,
            host_used_bytes=0,
            disk_budget_bytes=0,
            disk_used_bytes=0,
            models=node.models,
            tenants=(),
            route_url=self._url(told.route_url),
        )

    def _url(self, url: str) -> str:
        """Empty for what no node is called at: control checked it, and so does whoever dials."""
        url = self._dialled(url) if url else ""
        with suppress(BadValue):
            check_url(url, "url", ("http", "https"))
            return url
        return ""


class _Taken:
    """Words that are new, decoded before anything is changed. Raises ``BadMessage``. ``known``: by name, what
    all words are known by."""

    def __init__(self, words: dict[str, msgspec.Raw], before: Mapping[str, int]) -> None:
        self.known: dict[str, int] = {}
        self.keys: dict[str, KeyTold] = {}
        self.models: dict[str, ModelTold] = {}
        self.nodes: dict[str, NodeTold] = {}
        self.places: dict[str, PlacesTold] = {}
        self.gone: list[str] = []
        for name, raw in words.items():
            text = bytes(raw)
            kind, _, rest = name.partition("/")
            if text == bytes(NO_MORE):
                self.gone.append(name)
                continue
            self.known[name] = hash(text)
            if before.get(name) == self.known[name]:
                continue
            if kind == KEY:
                self.keys[rest] = decode(text, KeyTold)
            elif kind == MODEL:
                self.models[rest] = decode(text, ModelTold)
            elif kind == NODE:
                self.nodes[rest] = decode(text, NodeTold)
            elif kind == PLACES:
                self.places[rest] = decode(text, PlacesTold)
            # What a newer control tells of beside this is nothing to this router.


def _model(place: Place) -> ModelReport:
    return ModelReport(
        ref=place.ref,
        state=place.state,
        device=place.device,
        leases=0,
        waiting=0,
        device_bytes=place.device_bytes,
        host_bytes=place.host_bytes,
        disk_bytes=place.disk_bytes,
        requests=place.requests,
        answers=0,
        restores=(),
        last_used_ms=0,
        restore_ms_estimate=place.restore_ms,
    )
