"""Bugs to plant: each must make a test fail. tests/test_mutants*.py plant them in a copy.

A mutant replaces one piece of text, which occurs exactly once in its file, and names the test that
must notice. There are one or two for each class of bugs, and some in every kernel and folder of the
package. Quick ones are planted in every run, the others with --full. Two kinds are not in the
lists, since a test cannot see them here: a change without an effect (a second mask where one is
enough), and what only a GPU does differently (a barrier, a fused multiply-add).
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    killed_by: str
    quick: bool = False
