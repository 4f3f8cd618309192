"""A node's numbers in Prometheus' text format.

Covers: names, labels and units of every metric. Does not cover: counting (``agent/counters.py``) or the
ledger (``packer/residency.py``). Labels hold tenants, tiers and devices, whose number the operator
decides; models are not a label, because tenants decide how many there are. No prompts, no secrets.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from agent.accuracy import BUCKETS, Accuracy
from agent.counters import Counters
from packer.estimate import Rates, named_rates
from packer.types import HostForm
from packer.wire import RegretReport, Report, decode


class _Families:
    """What one scrape reads; made anew for each, so that nothing goes stale."""

    def __init__(
        self,
        report: Report,
        counters: Counters,
        accuracy: Accuracy,
        rates: Rates | None,
        host_form: HostForm,
        tenants: bool,
    ) -> None:
        self._report = report
        self._counters = counters
        self._accuracy = accuracy
        self._rates = rates
        self._host_form = host_form
        self._tenants = tenants

    def collect(self) -> Iterator[Metric]:
        for family in self._families():
            if self._tenants or not any("tenant" in sample.labels for sample in family.samples):
                yield family

    def _families(self) -> Iterator[Metric]:
        report, counters = self._report, self._counters
        device = GaugeMetricFamily(
            "bunkhouse_device_bytes", "Bytes of a device by use.", labels=["device", "use"]
        )
        for row in report.devices:
            device.add_metric([row.device, "budget"], row.budget_bytes)
            device.add_metric([row.device, "used"], row.used_bytes)
            device.add_metric([row.device, "foreign"], row.foreign_bytes)
        yield device
        tier = GaugeMetricFamily("bunkhouse_tier_bytes", "Bytes of a cache tier.", labels=["tier", "use"])
        tier.add_metric(["host", "budget"], report.host_budget_bytes)
        tier.add_metric(["host", "used"], report.host_used_bytes)
        tier.add_metric(["disk", "budget"], report.disk_budget_bytes)
        tier.add_metric(["disk", "used"], report.disk_used_bytes)
        yield tier
        tenant_bytes = GaugeMetricFamily(
            "bunkhouse_tenant_bytes", "Bytes a tenant holds in a tier.", labels=["tenant", "tier"]
        )
        requests = CounterMetricFamily("bunkhouse_requests", "Requests.", labels=["tenant"])
        answers = CounterMetricFamily("bunkhouse_answers", "Requests answered to the end.", labels=["tenant"])
        tokens = CounterMetricFamily("bunkhouse_tokens", "Tokens read and written.", labels=["tenant"])
        device_s = CounterMetricFamily(
            "bunkhouse_device_seconds", "Time engines worked for a tenant.", labels=["tenant"]
        )
        limit = GaugeMetricFamily(
            "bunkhouse_tenant_limit",
            "A tenant's rates on this node: the limit, what may come at once, and what is left of that.",
            labels=["tenant", "limit", "what"],
        )
        for tenant in report.tenants:
            name = tenant.tenant
            for rate in tenant.rates:
                limit.add_metric([name, rate.name, "limit"], rate.limit)
                limit.add_metric([name, rate.name, "burst"], rate.burst)
                limit.add_metric([name, rate.name, "remaining"], rate.remaining)
            tenant_bytes.add_metric([name, "device"], tenant.device_bytes)
            tenant_bytes.add_metric([name, "host"], tenant.host_bytes)
            tenant_bytes.add_metric([name, "disk"], tenant.disk_bytes)
            requests.add_metric([name], tenant.requests)
            answers.add_metric([name], tenant.answers)
            tokens.add_metric([name], tenant.tokens)
            device_s.add_metric([name], tenant.device_ms / 1000)
        yield from (tenant_bytes, requests, answers, tokens, device_s, limit)
        yield from self._lending()
        yield self._deduplicated()
        refusals = CounterMetricFamily("bunkhouse_refusals", "Requests refused.", labels=["tenant", "reason"])
        for (name, reason), count in sorted(counters.refusals.items()):
            refusals.add_metric([name, reason], count)
        yield refusals
        yield self._restores()
        yield self._estimate_errors()
        yield from self._calibration()
        yield from self._regret()
        yield from self._moves()
        yield CounterMetricFamily("bunkhouse_workers_died", "Worker processes gone.", counters.workers_died)
        yield CounterMetricFamily(
            "bunkhouse_chunks_corrupt", "Chunks of packs found bad and never used.", counters.chunks_corrupt
        )
        yield CounterMetricFamily(
            "bunkhouse_chunks_repaired", "Bad chunks that were fetched again.", counters.chunks_repaired
        )
        yield GaugeMetricFamily(
            "bunkhouse_usage_waiting",
            "1 while control has not confirmed all that tenants used on this node.",
            int(counters.usage_waits()),
        )
        yield CounterMetricFamily(
            "bunkhouse_records_lost", "Records the journal did not get.", counters.records_lost
        )

    def _moves(self) -> Iterator[Metric]:
        """Of what nobody waits for."""
        counters = self._counters
        yield CounterMetricFamily("bunkhouse_evictions", "Models evicted from devices.", counters.evictions)
        yield CounterMetricFamily(
            "bunkhouse_prefetched", "Packs brought into host memory ahead of need.", counters.prefetched
        )
        yield CounterMetricFamily(
            "bunkhouse_prefetches_stopped",
            "Packs on their way into host memory that stopped because somebody needed the disk.",
            counters.prefetches_stopped,
        )

    def _lending(self) -> Iterator[Metric]:
        debt = GaugeMetricFamily(
            "bunkhouse_tenant_debt_seconds",
            "What a tenant's restores took beyond those of a private slice; negative is credit.",
            labels=["tenant"],
        )
        lent = GaugeMetricFamily(
            "bunkhouse_tenant_lent_bytes", "Reserved device bytes that others hold.", labels=["tenant"]
        )
        borrowed = GaugeMetricFamily(
            "bunkhouse_tenant_borrowed_bytes", "Device bytes held beyond the reserve.", labels=["tenant"]
        )
        protected = GaugeMetricFamily(
            "bunkhouse_tenant_protected", "1: none of its reserved bytes may be lent now.", labels=["tenant"]
        )
        excused = CounterMetricFamily(
            "bunkhouse_tenant_excused_seconds",
            "Restores beyond the private slice's that no policy could have avoided.",
            labels=["tenant"],
        )
        for tenant in self._report.tenants:
            name, lending = [tenant.tenant], tenant.lending
            debt.add_metric(name, lending.debt_ms / 1000)
            lent.add_metric(name, lending.lent_bytes)
            borrowed.add_metric(name, lending.borrowed_bytes)
            protected.add_metric(name, int(lending.protected))
            excused.add_metric(name, lending.excused_ms / 1000)
        yield from (debt, lent, borrowed, protected, excused)

    def _regret(self) -> Iterator[Metric]:
        """From the node's own report, so that both say the same; of all tenants together."""
        if not self._report.regret:
            return
        found = decode(self._report.regret.encode(), RegretReport)
        cold = GaugeMetricFamily(
            "bunkhouse_regret_cold_seconds",
            "Restores in the window of the log: as they were, by LRU on whole models, by the clairvoyant "
            "optimum, and the least that any schedule could take.",
            labels=["schedule"],
        )
        for name, cold_ms in (
            ("actual", found.actual_ms),
            ("lru", found.lru_ms),
            ("optimum", found.optimum_ms),
            ("bound", found.bound_ms),
        ):
            cold.add_metric([name], cold_ms / 1000)
        yield cold
        if found.optimum_ms:
            ratio = found.actual_ms / found.optimum_ms
            yield GaugeMetricFamily("bunkhouse_regret_ratio", "Actual over optimum.", ratio)
        yield GaugeMetricFamily("bunkhouse_regret_uses", "Uses that were judged.", found.counted)
        yield GaugeMetricFamily(
            "bunkhouse_regret_window_seconds", "From first to last.", found.window_ms / 1000
        )
        yield GaugeMetricFamily(
            "bunkhouse_regret_timestamp_seconds", "When it was judged.", found.at_ms / 1000
        )

    def _deduplicated(self) -> Metric:
        family = GaugeMetricFamily(
            "bunkhouse_deduplicated_bytes",
            "Bytes of weights that packs on disk do not store again, because equal ones are stored.",
            labels=["tenant"],
        )
        totals: dict[str, int] = {}
        for model in self._report.models:
            tenant = model.ref.partition("/")[0]
            totals[tenant] = totals.get(tenant, 0) + model.deduplicated_bytes
        for tenant, nbytes in sorted(totals.items()):
            family.add_metric([tenant], nbytes)
        return family

    def _estimate_errors(self) -> Metric:
        family = HistogramMetricFamily(
            "bunkhouse_restore_estimate_error_ratio",
            "How far the expected time of a restore was off, as a share of the real one.",
            labels=["from_tier"],
        )
        for from_tier, seen in sorted(self._accuracy.tiers.items()):
            so_far, buckets = 0, []
            for bound, count in zip([*map(str, BUCKETS), "+Inf"], seen.buckets, strict=True):
                so_far += count
                buckets.append((bound, so_far))
            family.add_metric([from_tier.value], buckets, seen.total)
        return family

    def _calibration(self) -> Iterator[Metric]:
        form = GaugeMetricFamily(
            "bunkhouse_host_form", "The form in which the host tier keeps weights.", labels=["form"]
        )
        form.add_metric([self._host_form.value], 1)
        yield form
        rates = self._rates
        if rates is None:
            return
        family = GaugeMetricFamily(
            "bunkhouse_calibration_bytes_per_second", "What this box measured of itself.", labels=["rate"]
        )
        for name, rate in named_rates(rates).items():
            if rate:
                family.add_metric([name], rate)
        yield family
        yield GaugeMetricFamily(
            "bunkhouse_calibration_timestamp_seconds", "When this box was measured.", rates.measured_ms / 1000
        )

    def _restores(self) -> Metric:
        totals: dict[str, int] = {}
        for model in self._counters.models.values():
            for tier, count in model.restores.items():
                totals[tier.value] = totals.get(tier.value, 0) + count.count
        family = CounterMetricFamily("bunkhouse_restores", "Restores to a device.", labels=["from_tier"])
        for from_tier, total in sorted(totals.items()):
            family.add_metric([from_tier], total)
        return family


def render(
    report: Report,
    counters: Counters,
    accuracy: Accuracy,
    rates: Rates | None,
    host_form: HostForm,
    tenants: bool = True,
) -> str:
    """The exposition, without the families of tenants unless ``tenants``; cheap enough to make on each
    scrape."""
    registry = CollectorRegistry()
    registry.register(_Families(report, counters, accuracy, rates, host_form, tenants))
    return generate_latest(registry).decode()
