"""Control's own choice between boxes, for the simulator.

Covers: what control would know of every box at this moment, and asking ``choosing.rank``. Does not
cover: how late a real report may be (the simulator's boxes report at once), or the simulation itself.
"""

from __future__ import annotations

from control import copies
from control.choosing import rank
from control.cluster import Answered, Cluster, NodeView, Routed, step
from packer.gangs import share_bytes
from packer.ledger import State
from packer.simulated_box import Box
from packer.types import ModelRef
from packer.views import restore_ms_estimate
from packer.wire import DeviceReport, ModelReport, Report

_NEAR = (State.RESIDENT, State.RESTORING)


class Router:
    """One router in front of all boxes."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._refs: dict[int, ModelRef] = {}  # of versions with replicas that were asked for

    def choose(self, boxes: list[Box], model: int, now_ms: int) -> int:
        """The number of the box that a request for this model is sent to."""
        cluster = self._cluster
        spec = boxes[0].models[model].spec
        if spec.replicas > 1:
            return self._choose_holder(boxes, model, now_ms)
        for box in boxes:
            view = self._view(box)
            view.in_flight = view.in_flight_then = len(box.node.requests)
            view.by_ref = {str(spec.ref): _model_report(box, model)}
        chosen = rank(cluster, cluster.nodes.values(), spec.ref, share_bytes(spec), now_ms, spec.devices)[0]
        step(cluster, Routed(chosen, spec.ref), now_ms)
        return next(box.number for box in boxes if box.name == chosen)

    def ended(self, number: int, model: int, served: bool, now_ms: int) -> None:
        """A request for a version with replicas did, which counts for how fast its box is."""
        ref = self._refs[model]
        step(self._cluster, Answered(f"box{number}", True, ref, 200 if served else 507), now_ms)

    def _view(self, box: Box) -> NodeView:
        view = self._cluster.nodes.get(box.name)
        if view is None:
            view = self._cluster.nodes[box.name] = NodeView(box.name, f"http://{box.name}")
        view.report = _report(box)
        self._cluster.stale[box.name] = None
        return view

    def _choose_holder(self, boxes: list[Box], model: int, now_ms: int) -> int:
        """Of a version that may have copies: by the core that does it in production."""
        cluster, spec = self._cluster, boxes[0].models[model].spec
        text = str(spec.ref)
        self._refs[model] = spec.ref
        there = [box for box in boxes if box.models[model].state in _NEAR]
        cluster.near[text] = dict.fromkeys(box.name for box in there)
        # Others are looked at only where a further copy may be due.
        owed = cluster.waits.owed.get(spec.ref)
        due = owed is not None and owed.waited(now_ms) >= copies.WAITED_MS_MIN
        for box in boxes if due or not there else there:
            view = self._view(box)
            view.by_ref = {text: _model_report(box, model)}
            view.load_said, view.in_flight_then = len(box.node.requests), view.in_flight
            view.near = tuple(
                str(each.ref)
                for each in box.models
                if each.ref.tenant == spec.ref.tenant and each.state in _NEAR
            )
        nodes = copies.choose(cluster, spec, now_ms) or rank(
            cluster,
            cluster.nodes.values(),
            spec.ref,
            share_bytes(spec),
            now_ms,
            spec.devices,
            spec.replicas,
        )
        wait_ms = copies.wait_ms(cluster, spec, nodes[0], now_ms)
        step(cluster, Routed(nodes[0], spec.ref, share_bytes(spec), spec.devices, wait_ms), now_ms)
        return next(box.number for box in boxes if box.name == nodes[0])


def _report(box: Box) -> Report:
    devices = tuple(
        DeviceReport(
            name,
            "cuda",
            name,
            device.account.limit_bytes or 0,
            device.account.used_bytes,
            0,
            device.healthy,
        )
        for name, device in box.node.devices.items()
    )
    return Report(f"http://{box.name}", 0, box.node.draining, devices, 0, 0, 0, 0, (), ())


def _model_report(box: Box, number: int) -> ModelReport:
    model = box.models[number]
    # What is there in part counts as absent, as in an agent's report.
    state = "absent" if model.state is State.PARTIAL else model.state.value
    return ModelReport(
        ref=str(model.ref),
        state=state,
        device=None,
        leases=model.leases,
        waiting=len(model.waiters),
        device_bytes=model.device_bytes,
        host_bytes=model.host.held_bytes,
        disk_bytes=model.disk.held_bytes,
        requests=0,
        answers=0,
        restores=(),
        last_used_ms=0,
        restore_ms_estimate=restore_ms_estimate(box.node, model.ref) if model.spec.replicas > 1 else 0,
    )
