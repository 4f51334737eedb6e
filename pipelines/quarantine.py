"""The table of records that were set aside, and the limit on how many there may be."""

from collections import Counter

import pyarrow as pa

from pipelines import storage
from pipelines.records import Partition
from pipelines.schema import QUARANTINE
from pipelines.tokenize import read_outcomes

QUARANTINE_FILE = "quarantine.arrow"


def write_quarantine(out: str, work: str, partitions: list[Partition]) -> str:
    """Gather the records set aside in these (tokenized) partitions into one table. Returns its path or URI."""
    tables = [QUARANTINE.empty_table()]
    for partition in partitions:
        outcomes = read_outcomes(partition.outcomes_file(work))
        bad = outcomes.filter(outcomes["reason"].is_valid())
        bad = bad.append_column("split", pa.array([partition.split] * bad.num_rows, pa.string()))
        tables.append(bad.select(QUARANTINE.names).cast(QUARANTINE))
    uri = storage.join(out, QUARANTINE_FILE)
    storage.write_table(uri, pa.concat_tables(tables).combine_chunks())
    return uri


def over_limit(
    limit: float, total: int, statistics: dict[str, dict], partitions: list[Partition], out: str, work: str
) -> str:
    """Write the table of what was set aside so far, and give the message that it is too much.

    Args:
        limit: the recipe's `max_quarantined`.
        total: records of all splits.
        statistics: of the partitions done so far, by name.
        partitions: all.
        out: folder of the data set.
        work: folder of the partitions' files.
    """
    table = write_quarantine(out, work, [partition for partition in partitions if partition.name in statistics])
    counts = Counter()
    for result in statistics.values():
        counts.update(result["quarantined"])
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))
    return (
        f"{counts.total()} of {total} records were set aside ({reasons}), more than max_quarantined = {limit:g} "
        f"allows. See {storage.shown(table)}, then repair the sources or raise max_quarantined."
    )
