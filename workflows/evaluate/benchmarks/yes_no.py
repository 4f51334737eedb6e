"""What POPE and VSR share: two answers, scored by the first token's probability and by the generated text."""

import numpy as np

from workflows.evaluate.benchmarks.base import OVERALL, Benchmark, Item, Score
from workflows.evaluate.metrics import average_precision, mean, precision_recall_f1, roc_auc


class YesNo(Benchmark):
    """Accuracy, precision, recall, F1 and the share of positive answers, for each type and as the mean over types.

    By probability: the positive choice if its token is at least as probable as the other's, as first token of the
    answer; also the areas under ROC and precision-recall. By text (names that begin with text/): what `said` reads.
    """

    def said(self, text: str) -> float | None:
        """What a generated answer says: 1 the positive choice, 0 the other, None neither."""
        raise NotImplementedError

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        positive = item.details["positive"]
        text = self.said(prediction)
        by_text = 0.0 if text is None else float(text == positive)
        if p_yes is None:
            return Score(by_text, by_text, text)
        return Score(float((p_yes >= 0.5) == bool(positive)), by_text, text)

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        kinds = [str(kind) for kind in np.unique(table["type"])]
        by_kind = {kind: cls._of(table, weights * (table["type"] == kind)) for kind in kinds}
        names = next(iter(by_kind.values()))
        scores = {name: float(np.mean([one[name] for one in by_kind.values()])) for name in names}
        for kind, one in by_kind.items():
            scores[kind], scores[f"text/{kind}"] = one[OVERALL], one[f"text/{OVERALL}"]
            scores |= {f"{name}/{kind}": value for name, value in one.items() if not name.endswith(OVERALL)}
        return scores

    @staticmethod
    def _of(table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        positive, p_yes = table["positive"], table["p_yes"]
        scores = {OVERALL: mean(table["score"], weights), f"text/{OVERALL}": mean(table["text_score"], weights)}
        text = np.nan_to_num(table["text_yes"])  # neither is not the positive choice
        sides = {"text/": text}
        if not np.isnan(p_yes).any():
            sides[""] = (p_yes >= 0.5).astype(float)
            scores["roc_auc"] = roc_auc(positive, p_yes, weights)
            scores["pr_auc"] = average_precision(positive, p_yes, weights)
        for prefix, claimed in sides.items():
            precision, recall, f1 = precision_recall_f1(positive, claimed, weights)
            scores |= {f"{prefix}precision": precision, f"{prefix}recall": recall, f"{prefix}f1": f1}
            scores[f"{prefix}yes_rate"] = mean(claimed, weights)
        scores["text/unclear"] = mean(np.isnan(table["text_yes"]).astype(float), weights)
        return scores
