"""How the teachers of the demo's tasks write a block, and how they break one."""

from collections.abc import Sequence

DEFECTS = (
    "untagged",  # the task's own: the same work without tags
    "step_not_opened",
    "step_not_closed",
    "plan_dropped",
    "guideline_not_closed",
    "stray_text",
    "wrong_number",
    "no_takeaway",
)


def write_block(
    plans: Sequence[str],
    steps: Sequence[str],
    takeaway: str,
    defect: str | None = None,
    hit: int = 0,
    stray: str = "",
) -> str:
    """A block with these texts, plans and steps numbered from 1.

    Args:
      defect: one of DEFECTS, which breaks the format, or None; hit: the plan or step, from 0, that
        it is in; stray: what "stray_text" puts behind that step.
    """
    open_, close = [f"<plan>{n}:{text}</plan>" for n, text in enumerate(plans, 1)], "</guideline>"
    bodies = [f"<step>\n{n}:{text}\n</step>" for n, text in enumerate(steps, 1)]
    end = f"<takeaway>\n{takeaway}\n</takeaway>"
    match defect:
        case "step_not_opened":
            bodies[hit] = bodies[hit].removeprefix("<step>\n")
        case "step_not_closed":
            bodies[hit] = bodies[hit].removesuffix("\n</step>")
        case "plan_dropped":
            del open_[hit]
        case "guideline_not_closed":
            close = ""
        case "stray_text":
            bodies[hit] += f"\n{stray}"
        case "wrong_number":
            bodies[hit] = bodies[hit].replace(f"\n{hit + 1}:", f"\n{(hit + 2) % 10}:", 1)
        case "no_takeaway":
            end = takeaway
    parts = ["<guideline>", *open_, close, *bodies, end]
    return "\n".join(part for part in parts if part)
