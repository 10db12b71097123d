"""Benchmarks of a model that answers questions about images.

    task = load_task("pope", TaskOptions(data=Path("coco_pope_random.json"), images=Path("val2014")))
    result = evaluate(task, model, out=Path("results"))       # results/pope.json, pope.md, pope.answers.jsonl

`tasks` reads the benchmarks' own files, `yes_no`, `captions`, `chair` and `vqa` score answers, `bootstrap` says how sure a figure is.
"""

from tuna_model.evaluation.bootstrap import Metric
from tuna_model.evaluation.run import Answer, Answerer, Result, evaluate, markdown
from tuna_model.evaluation.tasks import TASKS, Question, Task, TaskOptions, load_task

__all__ = [
    "TASKS",
    "Answer",
    "Answerer",
    "Metric",
    "Question",
    "Result",
    "Task",
    "TaskOptions",
    "evaluate",
    "load_task",
    "markdown",
]
