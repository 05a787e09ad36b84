"""The trace of the courses' strategy: each decision stands behind what it rests on."""

from cogumi_dagster.lib.tasks.base import Task


def check_and_take(task: Task) -> str:
    """The courses to do and the pairs that are left, then for each course from the lowest on a pair that ends in it, up
    to the first that none ends in, which is taken; again and again, until none is to do or none is free.

    Where it was only said which course is free, or that none is, 86 of 91 first errors of a student were in that.
    ``task`` has the family's own solution, whose first line holds the problem.
    """
    first, answer = str(task.solution).splitlines()[0], str(task.solution).splitlines()[-1]
    todo, left = (part.split()[1:] for part in first.split("; "))
    left = [pair for pair in left if ">" in pair]
    lines = []
    while todo:
        lines.append(f"{' '.join(todo)}; {' '.join(left) or 'none'}")
        behind: list[str] = []
        for course in todo:
            pair = next((pair for pair in left if pair.endswith(f">{course}")), None)
            if pair is None:
                break
            behind.append(pair)
        else:
            return "\n".join([*lines, f"{' '.join(behind)} stuck", answer])
        lines.append(" ".join([*behind, f"take {course}"]))
        todo.remove(course)
        left = [pair for pair in left if not pair.startswith(f"{course}>")]
    return "\n".join([*lines, "all taken", answer])
