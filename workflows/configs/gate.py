"""The gate before promotion: what a version's scores must be before an alias moves to it."""

from pydantic import Field, model_validator

from pipelines.config import StrictModel


class Gate(StrictModel):
    """Conditions on scores by name: "overall", a question type, "margin_over_blind", or another score of the
    evaluation. All must hold. The gate is stored with the version, so promotion needs no recipe."""

    least: dict[str, float] = Field(default_factory=dict)
    """Least value."""
    most: dict[str, float] = Field(default_factory=dict)
    """Greatest value, for scores where less is better."""
    margin: dict[str, float] = Field(default_factory=dict)
    """How much worse than the version that holds the alias the score may be: 0.01 allows 0.90 where it has 0.91, 0
    allows no loss. Nothing is compared while no version holds the alias."""

    @model_validator(mode="before")
    @classmethod
    def _say_where_thresholds_go(cls, content):
        flat = {k: v for k, v in content.items() if k not in cls.model_fields} if isinstance(content, dict) else {}
        if flat:
            names = ", ".join(f"{name}: {value}" for name, value in flat.items())
            raise ValueError(f"thresholds go under least: write gate: {{least: {{{names}}}}}")
        return content

    @model_validator(mode="after")
    def _possible(self):
        for name, allowed in self.margin.items():
            if allowed < 0:
                raise ValueError(f"margin.{name} = {allowed}: how much worse a score may be is 0 or more")
        for name in self.least.keys() & self.most.keys():
            if self.least[name] > self.most[name]:
                raise ValueError(f"{name}: least = {self.least[name]} is over most = {self.most[name]}")
        return self
