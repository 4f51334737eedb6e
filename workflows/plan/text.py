"""The plan for a person."""

from workflows.console import duration

_GIB = 2**30


def training_text(plan: dict) -> str:
    """Tables of a training's plan; an estimate has a tilde before it."""
    sizes = plan["parameters"]
    lines = [
        f"recipe      {plan['recipe']}: {plan['workers']} workers, ZeRO {plan['zero_stage']} ({plan['reckoned_with']})",
        f"model       {_millions(sizes['total'])}: vision {_millions(sizes['vision'])}, connector "
        f"{_millions(sizes['connector'])}, language model {_millions(sizes['language_model'])}; vocabulary "
        f"{plan['vocabulary']['rows']:,} ({plan['vocabulary']['from']})",
    ]
    for stage in plan["stages"]:
        lines += ["", *_stage_lines(stage, plan["zero_stage"])]
    disk = plan["disk"]
    kept = ("data", *(["features"] if disk["features"] else []), "models", "checkpoints", "registered")
    parts = ", ".join(f"{name} {_gib(disk[name])}" for name in kept)
    lines += ["", f"storage     {_gib(disk['total'])}: {parts}", f"in all      {_hours_of_all(plan)}"]
    return "\n".join(lines)


def data_text(plan: dict) -> str:
    """Tables of a preparation's plan."""
    lines = []
    for data in plan["data"]:
        rows = data["rows"]
        about = "~" if rows["estimated"] else ""
        lines.append(f"{data['folder']}  ({rows['how']})")
        if rows["rows"] is not None:
            disk = data["disk"]
            lines += [
                f"  samples   {about}{rows['samples']:,} with {about}{rows['images']:,} images, "
                f"{about}{rows['tokens']:,} tokens",
                f"  rows      {about}{rows['rows']:,} of {data['max_tokens']:,} tokens in {about}{data['shards']:,} "
                "shards",
                f"  storage   {about}{_gib(disk['total'])} while it works, {about}{_gib(disk['shards'])} afterwards",
                f"  nodes of {data['node_cpus']} CPUs   time           memory of each   read and written",
                *(_node_line(node, about) for node in data["nodes"]),
            ]
    return "\n".join(lines)


def _node_line(node: dict, about: str) -> str:
    time, memory = about + duration(3600 * node["hours"]), about + _gib(node["node_memory"])
    return f"  {node['nodes']:>16}   {time:<13}  {memory:<15}  {about}{node['bytes_per_second'] / 1e6:,.0f} MB/s"


def _stage_lines(stage: dict, chosen: int) -> list[str]:
    rows = stage["rows"]
    about = "~" if rows["estimated"] and rows["rows"] is not None else ""
    lines = [
        f"== {stage['stage']}: trains {', '.join(stage['trains'])} ({_millions(stage['trained'])}; frozen "
        f"{_millions(stage['frozen'])}), lr {stage['learning_rate']:g}, weight decay {stage['weight_decay']:g}",
        f"rows        {about}{_count(rows['rows'])} ({rows['how']})",
    ]
    if stage.get("note"):
        lines.append(f"            {stage['note']}")
    if stage["positions"] is None:
        return lines
    at_once = f"{'at most ' * stage['micro_batch_rows_measured']}{stage['micro_batch_rows']}"
    lines += [
        f"steps       {about}{stage['steps']:,} of {stage['batch_rows']} rows, {about}{stage['batch_samples']:.0f} "
        f"samples ({at_once} x {stage['accumulation']} per worker); {about}{stage['samples']:,} "
        f"samples, {about}{stage['positions'] / 1e6:,.1f}M tokens with padding",
        f"operations  {about}{stage['flops']:.2e}, {stage['hardware_flops']:.2e} with recomputation; "
        f"{_hours(stage['hours'])}",
        f"checkpoint  {_gib(stage['checkpoint_bytes'])}",
        *_features_line(stage["features"]),
        "memory      GiB per worker  weights  gradients  optimizer  buffers  activations    total  sent a step",
    ]
    memory = stage["memory"]
    kept = memory["activations"]["with" if memory["checkpointing"] else "without"]
    for state, sends in zip(memory["zero"], stage["communication"], strict=True):
        numbers = [state[name] / _GIB for name in ("weights", "gradients", "optimizer", "buffers")]
        mark = "*" if state["zero_stage"] == chosen else " "
        fits = {True: "", False: "  does not fit", None: ""}[state["fits"]]
        cpu = f"  and {_gib(state['on_cpu'])} of main memory" if state["on_cpu"] else ""
        lines.append(
            f"          {mark} ZeRO {state['zero_stage']}          "
            + "{:>7.2f}  {:>9.2f}  {:>9.2f}  {:>7.2f}".format(*numbers)
            + f"  {kept / _GIB:>11.2f}  {state['with_activations'] / _GIB:>7.2f}  {sends['total'] / _GIB:>11.2f}"
            + f"{cpu}{fits}"
        )
    other = memory["activations"]["without" if memory["checkpointing"] else "with"]
    word = "without" if memory["checkpointing"] else "with"
    lines.append(f"            activations {word} checkpointing: {_gib(other)}")
    (sends,) = [sends for sends in stage["communication"] if sends["zero_stage"] == chosen]
    lines.append(
        f"sent        by a worker in a step: {_gib(sends['gathered'])} gathered, {_gib(sends['reduced'])} reduced"
    )
    return lines


def _features_line(features: dict | None) -> list[str]:
    if features is None:
        return []
    kept = f"{_gib(features['bytes'])} at most, kept beside the data set"
    return [f"features    {'not kept: ' + features['why_not'] if features['why_not'] else kept}"]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,}"


def _gib(size: float | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _hours_of_all(plan: dict) -> str:
    if any(stage["positions"] is None for stage in plan["stages"]):
        return "unknown"
    return _hours(plan["hours"])


def _hours(hours: float | None) -> str:
    return "time unknown: --peak-tflops and --mfu" if hours is None else f"about {duration(3600 * hours)}"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
