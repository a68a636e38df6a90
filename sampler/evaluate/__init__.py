"""How good samples are, by the stages that judged the footage they were trained on: `evaluate_samples`."""

from sampler.evaluate.evaluation import evaluate_samples
from sampler.evaluate.result import Evaluation

__all__ = ["Evaluation", "evaluate_samples"]
