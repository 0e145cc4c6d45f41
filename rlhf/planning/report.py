"""The plan as text."""

from rlhf.planning.plan import GIB, MOST, Plan
from rlhf.planning.stage import ROLES
from rlhf.run.processes import main_process

NOT_COUNTED = (
    "Not counted: the CUDA context and libraries (about 1 GiB a GPU), fragmentation, workspaces inside operations, "
    "buffers of communication (docs/plan.md)."
)


def print_plan(plan: Plan) -> None:
    """Print a plan; of several processes, the main one does."""
    if main_process():
        print("\n".join(lines_of(plan)))


def lines_of(plan: Plan) -> list[str]:
    """The lines of a plan."""
    lines = [f"Plan of recipes/{plan.recipe}.py for {plan.launch.words}; {', '.join(plan.rows)}.", ""]
    lines += [
        f"{name}: {every:,} parameters, {trained:,} trained" for name, (every, trained) in plan.parameters.items()
    ]
    lines += ["", *_table(plan), ""]
    lines.append(f"The peak is {plan.peak.at_rows.total / GIB:.2f} GiB, in: {plan.peak.name}.")
    total = sum(phase.operations for phase in plan.phases)
    shares = ", ".join(f"{phase.name} {phase.operations / total:.0%}" for phase in plan.phases)
    lines.append(
        f"One {plan.step} on all processes: {plan.tokens:,.0f} tokens, {total * plan.launch.processes:.2e} "
        "floating-point operations" + (f" ({shares})." if len(plan.phases) > 1 else ".")
    )
    for flag, rows in plan.fits.items():
        now = next(phase.rows for phase in plan.phases if phase.flag == flag)
        if rows == 0:
            lines.append(f"{plan.memory:g} GiB: none fits, not even {flag} 1.")
        else:
            lines.append(f"{plan.memory:g} GiB: {flag} {'any' if rows == MOST else f'{rows:,}'} fits (now {now}).")
    return [*lines, NOT_COUNTED]


def _table(plan: Plan) -> list[str]:
    """GiB by role and phase."""
    memories = [phase.at_rows.memory for phase in plan.phases]
    roles = [role for role in ROLES if any(memory.get(role, 0) for memory in memories)]
    where = "process" if plan.launch.on_cpu else "GPU"
    rows = [[f"GiB per {where}, at the peak", *(phase.name for phase in plan.phases)]]
    rows += [[role, *(f"{memory.get(role, 0) / GIB:.3f}" for memory in memories)] for role in roles]
    rows.append(["total", *(f"{phase.at_rows.total / GIB:.3f}" for phase in plan.phases)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
