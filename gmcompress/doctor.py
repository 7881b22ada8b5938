"""Examine a model before it is compressed: what becomes of every parameter, and whether the outcome runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from math import gcd, prod
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from .copies import count_parameters, parameters_of
from .errors import GMError
from .forward import Inputs, run_seeded, shell
from .groups import Group, largest_quotient
from .groups import group as parse_group
from .jobs import apart
from .kinds import kind_of, layouts_of
from .nesting import describe
from .pipeline import check_outputs, compress, model_name
from .planning import Plan, choose
from .rehearsal import rehearsed_sites, watch
from .surgery import Site, check_model, site_name, trace
from .tables import percent, table_text

RANK = 0  # of the trial: group matrices alone, which every quotient but the trivial one makes smaller
VERDICTS = {
    "compressible": "becomes group matrices",
    "widths": "no quotient of the group divides its widths; a budget may still make it smaller",
    "grouped": "a grouped convolution, each group too narrow for the group; a budget may still make it smaller",
    "stem": "left dense unless include names it",
    "classifier": "left dense unless include names it",
    "parametrized": "computed from other tensors; remove the parametrization first",
    "obstructed": "its module cannot be replaced as it is",
    "unsupported": "not known to be a matrix that is multiplied with; left dense",
}
UNDER_BUDGET = ("compressible", "widths", "grouped")
CALLED, FUNCTIONAL, NEVER, UNREAD, UNSEEN = "called", "read functionally", "never called", "never read", "not seen"
PROBE = Site("(always fits)", (), kind_of(nn.Linear), (8, 8), 1, 64, None, "", "")


@dataclass(frozen=True)
class Finding:
    """What was found about one parameter of at least two dimensions; tied ones are one parameter with other names.

    `group` is the largest quotient that divides the widths, "" where only the trivial one does. `use` is how a forward
    pass on the inputs used it: "called", "called 2 times", "read functionally" (its module never ran), "never called",
    "never read" (its module ran, its values were not used); without inputs what torch.fx saw, "not seen" where it saw
    no call; "" where unknown. `leaf` is the module around it into which torch.fx does not look, if any.
    """

    name: str
    aliases: tuple[str, ...]
    module: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    conv_groups: int
    group: str
    verdict: str  # one of VERDICTS
    reason: str
    use: str
    leaf: str
    tied: tuple[str, ...]  # the other modules that hold it
    frozen: bool

    def remarks(self) -> str:
        """All that is out of the ordinary about it, in one phrase."""
        found = [self.reason]
        if self.conv_groups > 1 and self.verdict != "grouped":
            found.append(f"in {self.conv_groups} convolution groups")
        found.append("" if self.use == CALLED else f"{self.use} by torch.fx" if self.use == UNSEEN else self.use)
        found.append(f"inside {self.leaf}, into which torch.fx does not look" if self.leaf else "")
        found.append(f"shared with {', '.join(self.tied)}, and stays so" if self.tied else "")
        found.append("frozen, which is no obstacle" if self.frozen else "")
        return "; ".join(each for each in found if each)


@dataclass(frozen=True)
class Examination:
    """What `gmcompress.doctor` found. `parameters` counts all of the model, of whatever shape, tied ones once.

    `traced` says whether torch.fx could trace the model. `inputs` are the shapes that it ran on, "" without a run, and
    then `run_problem` says why, "" where none were given. `compressed` counts the parameters after a trial
    compression, None where it failed; `problem` says why that, or a run of its outcome, failed.
    """

    model: str
    group: str
    parameters: int
    findings: tuple[Finding, ...]
    traced: bool
    inputs: str
    run_problem: str
    compressed: int | None
    problem: str

    @property
    def works(self) -> bool:
        """Whether the model was compressed, and the outcome ran and gave outputs of the same structure."""
        return self.compressed is not None and bool(self.inputs) and not self.problem

    @property
    def reach(self) -> float:
        """The share of all parameters that can become group matrices."""
        return self.share("compressible")

    def share(self, *verdicts: str) -> float:
        """The share of all parameters that have one of these verdicts.

        Raises:
            GMError: there is no such verdict.
        """
        unknown = [each for each in verdicts if each not in VERDICTS]
        if unknown:
            raise GMError(f"there is no verdict {unknown[0]!r}; there are {', '.join(VERDICTS)}")
        held = sum(each.parameters for each in self.findings if each.verdict in verdicts)
        return held / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it, the totals included."""
        shares = {each: self.share(each) for each in VERDICTS}
        return asdict(self) | {"works": self.works, "reach": self.reach, "shares": shares}

    def __str__(self) -> str:
        columns = ["parameter", "kind", "shape", "share#", "verdict", "group", "remarks"]
        rows = [
            (
                each.name,
                each.kind.rpartition(".")[2],
                "×".join(map(str, each.shape)),
                percent(each.parameters, self.parameters),
                each.verdict,
                each.group,
                each.remarks(),
            )
            for each in self.findings
        ]
        found = Counter(each.verdict for each in self.findings)
        totals = [
            (each, str(found[each]), percent(self.share(each), 1), text)
            for each, text in VERDICTS.items()
            if found[each]
        ]
        rest = self.parameters - sum(each.parameters for each in self.findings)
        totals.append(("(vectors)", "", percent(rest, self.parameters), "biases, norms, scales; left dense"))
        parts = [table_text(f"Examination of {self.model} for {self.group}", columns, rows)]
        parts.append(table_text("", ["verdict", "count#", "share#", "what it means"], totals))
        return "\n".join([*parts, *self.lines()])

    def lines(self) -> list[str]:
        """The totals in a few sentences."""
        budget = 100 * self.share(*UNDER_BUDGET)
        found = [
            f"{100 * self.reach:.1f} % of {self.parameters:,} parameters can become group matrices, "
            f"{budget:.1f} % at most can be made smaller under a budget"
        ]
        lost = "cannot trace it: without inputs calls are unknown, and stem and classifier follow from the order alone"
        found.append(f"torch.fx {'can trace it' if self.traced else lost}")
        without = self.run_problem or "no inputs were given, so that nothing was run"
        found.append(f"it runs on inputs of shape {self.inputs}" if self.inputs else without)
        if self.compressed is None:
            found.append(f"it cannot be compressed: {self.problem}")
        elif self.problem:
            found.append(f"compressed, it does not run as before: {self.problem}")
        else:
            sizes = f"{self.parameters:,} → {self.compressed:,} parameters"
            found.append(
                f"compressed without a residual ({sizes}), it {'runs' if self.inputs else 'has not been run'}"
                + (" and gives outputs of the same structure" if self.inputs else "")
            )
        return found


def examine(model: nn.Module, inputs: Inputs | None = None, group: str | Group = "C32xC32") -> Examination:
    """What `compress` can do with every weight of a model, found by running and compressing it; it does not change.

    Goes on where something fails, and says what: without inputs, or where the model does not run on them, from what
    torch.fx sees, and where that cannot trace it, from the modules alone. Public as `gmcompress.doctor`.

    Raises:
        GMError: an unknown or the trivial group; the model is wrapped, scripted, on meta or not yet initialised.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> found = examine(model, model[0].weight.detach(), "C8xC8")
    >>> [(each.name, each.verdict, each.group) for each in found.findings]
    [('0.weight', 'compressible', 'C8xC8'), ('2.weight', 'classifier', 'C2')]
    >>> found.works
    True
    """
    check_model(model)
    wanted = group if isinstance(group, Group) else parse_group(group)
    expected, given, failed = None, inputs, ""
    if inputs is not None:
        try:
            model = apart(model, inputs)
            expected = run_seeded(shell(model), inputs)
        except GMError as problem:
            given, failed = None, str(problem)
    traced = any(site.calls is not None for site in trace(model))
    plan = _plan(model, given, wanted)
    compressed, trouble = _trial(model, plan, given, expected)
    return Examination(
        model=model_name(model),
        group=str(wanted),
        parameters=count_parameters(model),
        findings=_findings(model, plan, wanted, None if given is None else watch(model, given)),
        traced=traced,
        inputs="" if given is None else describe(given),
        run_problem=failed,
        compressed=compressed,
        problem=trouble,
    )


def _plan(model: nn.Module, inputs: Inputs | None, group: Group) -> Plan:
    """The literal plan, with reasons for what it leaves out, also where that is everything."""
    sites = rehearsed_sites(model, inputs)
    total = count_parameters(model)
    with_probe = (*sites, PROBE)  # choose refuses to plan nothing, so one layer goes along that always fits
    plan = choose(with_probe, group, model_parameters=total, rank=RANK, overrides={PROBE.name: "lowrank:1"})
    return changed(plan, layers={name: plan.layers[name] for name in plan.layers if name != PROBE.name}, sites=sites)


def _trial(model: nn.Module, plan: Plan, inputs: Inputs | None, expected: Any) -> tuple[int | None, str]:
    """The size of the model compressed by this plan, None where that fails, and what went wrong then or in its run."""
    small = None
    try:
        if not plan.layers:
            raise GMError(f"no weight can be compressed: {next(iter(plan.skipped.values()), 'it holds none')}")
        small = compress(model, plan=plan).model
        if inputs is not None:
            check_outputs(expected, run_seeded(shell(small), inputs))
        problem = ""
    except GMError as refused:
        problem = str(refused)
    except Exception as broken:  # whatever it is, finding it is what an examination is for
        problem = f"{type(broken).__name__}: {str(broken).strip().splitlines()[0] if str(broken).strip() else ''}"
    return None if small is None else count_parameters(small), problem


def _findings(
    model: nn.Module, plan: Plan, group: Group, watched: tuple[Counter[str], set[str]] | None
) -> tuple[Finding, ...]:
    """One finding for every parameter of at least two dimensions, in the order of the model's definition."""
    modules = dict(model.named_modules())
    sites = {site.name: site for site in plan.sites}
    names: dict[int, list[str]] = {}
    for name, parameter in parameters_of(model, aliases=True).items():
        names.setdefault(id(parameter), []).append(name)
    holders: dict[int, list[str]] = {}  # distinct modules, by their first names
    for name, module in modules.items():
        for each in module._parameters.values():
            if each is not None:
                holders.setdefault(id(each), []).append(_owner(name + ".") if name else "")
    found = []
    for name, parameter in parameters_of(model).items():
        if parameter.dim() < 2:
            continue
        owner, key = _owner(name), _key(name)
        site = sites.get(site_name(owner, key))
        verdict, reason = _verdict(modules[owner], key, site, plan)
        found.append(
            Finding(
                name=name,
                aliases=tuple(each for each in names[id(parameter)] if each != name),
                module=owner,
                kind=kind_of(_plain_type(modules[owner])),
                shape=tuple(parameter.shape),
                parameters=parameter.numel(),
                conv_groups=1 if site is None else site.conv_groups,
                group="" if site is None else _quotient(group, site),
                verdict=verdict,
                reason=reason,
                use=_use(name, holders[id(parameter)], site, watched),
                leaf=_leaf(modules, owner),
                tied=tuple(holders[id(parameter)][1:]),
                frozen=not parameter.requires_grad,
            )
        )
    return tuple(found)


def _owner(name: str) -> str:
    """The module that a parameter belongs to; of a parametrized one, that which has the parametrization."""
    parts = name.split(".")[:-1]
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts)


def _key(name: str) -> str:
    """The name of a parameter in its module; of the tensors of a parametrized one, the name of that."""
    parts = name.split(".")
    return parts[parts.index("parametrizations") + 1] if "parametrizations" in parts else parts[-1]


def _plain_type(module: nn.Module) -> type[nn.Module]:
    """The type of a module, of a parametrized one that which it had before."""
    return parametrize.type_before_parametrizations(module) if parametrize.is_parametrized(module) else type(module)


def _verdict(module: nn.Module, key: str, site: Site | None, plan: Plan) -> tuple[str, str]:
    """The verdict on one parameter, and its reason where the plan gives one."""
    if parametrize.is_parametrized(module):
        return "parametrized", "" if site is None else site.obstacle
    if site is None:
        return "unsupported", "a vector, whatever the number of its axes"
    reason = plan.skipped.get(site.name, "")
    if key not in layouts_of(type(module)):
        return "unsupported", reason
    if site.obstacle:
        return "obstructed", reason
    if site.name in plan.layers:
        return "compressible", ""
    if site.role in ("stem", "classifier"):
        return site.role, ""
    return "grouped" if site.conv_groups > 1 else "widths", reason


def _quotient(group: Group, site: Site) -> str:
    """The largest quotient that divides rows and columns, "" where it is the trivial one."""
    found = largest_quotient(group, gcd(site.shape[0] // site.conv_groups, prod(site.shape[1:2])))
    return "" if found.order == 1 else str(found)


def _use(name: str, holders: Sequence[str], site: Site | None, watched: tuple[Counter[str], set[str]] | None) -> str:
    """How a parameter is used in a forward pass, as `Finding` describes it."""
    if watched is None:
        if site is None or site.calls is None:
            return ""
        return _times(site.calls) if site.calls else UNSEEN
    calls, read = sum(watched[0][each] for each in dict.fromkeys(holders)), name in watched[1]
    if not calls:
        return FUNCTIONAL if read else NEVER
    return _times(calls) if read else UNREAD


def _times(calls: int) -> str:
    return CALLED if calls == 1 else f"{CALLED} {calls} times"


def _leaf(modules: Mapping[str, nn.Module], owner: str) -> str:
    """The outermost module around this one that torch.fx, as timm uses it, leaves unopened; "" where there is none."""
    from timm.models import is_notrace_module

    parts = owner.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        module = modules[name]
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue  # holds modules and is never called
        if is_notrace_module(type(module)) or fx.Tracer().is_leaf_module(module, name):
            return f"{name} ({type(module).__name__})"
    return ""
