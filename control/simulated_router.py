"""Control's own choice between boxes, for the simulator.

Covers: what control would know of every box at this moment, and asking ``choosing.rank``. Does not
cover: how late a real report may be (the simulator's boxes report at once), or the simulation itself.
"""

from __future__ import annotations

from control.choosing import rank
from control.cluster import Cluster, NodeView, Routed, step
from packer.gangs import share_bytes
from packer.ledger import State
from packer.simulated_box import Box
from packer.wire import DeviceReport, ModelReport, Report


class Router:
    """One router in front of all boxes."""

    def __init__(self) -> None:
        self._cluster = Cluster()

    def choose(self, boxes: list[Box], model: int, now_ms: int) -> int:
        """The number of the box that a request for this model is sent to."""
        cluster = self._cluster
        spec = boxes[0].models[model].spec
        for box in boxes:
            view = cluster.nodes.get(box.name)
            if view is None:
                view = cluster.nodes[box.name] = NodeView(box.name, f"http://{box.name}")
            view.report = _report(box)
            view.in_flight = view.in_flight_then = len(box.node.requests)
            view.by_ref = {str(spec.ref): _model_report(box, model)}
        chosen = rank(cluster, cluster.nodes.values(), spec.ref, share_bytes(spec), now_ms, spec.devices)[0]
        step(cluster, Routed(chosen, spec.ref), now_ms)
        return next(box.number for box in boxes if box.name == chosen)


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
    )
