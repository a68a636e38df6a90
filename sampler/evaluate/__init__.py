"""How good samples are, by the stages that judged the footage they were trained on: `evaluate_samples`."""

from sampler.evaluate.evaluation import Evaluation, evaluate_samples

__all__ = ["Evaluation", "evaluate_samples"]
