"""Benchmarks of a model that answers questions about images.

    task = load_task("pope", TaskOptions(data=Path("coco_pope_random.json"), images=Path("val2014")))
    result = evaluate(task, model, out=Path("results"))       # results/pope.json, pope.md, pope.answers.jsonl

`tasks` reads the benchmarks' own files; `yes_no`, `captions`, `chair`, `vqa`, `naming` and `choice` score
answers; `bootstrap` adds intervals.
"""

from tuna_model.evaluation.bootstrap import Metric
from tuna_model.evaluation.questions import Question, Task, TaskAnswer, TaskOptions
from tuna_model.evaluation.run import Answerer, Result, evaluate, markdown
from tuna_model.evaluation.tasks import TASKS, load_task

Answer = TaskAnswer
"""Deprecated name of `TaskAnswer`."""

__all__ = [
    "TASKS", "Answerer", "Metric", "Question", "Result", "Task", "TaskAnswer", "TaskOptions", "evaluate",
    "load_task", "markdown",
]  # fmt: skip
