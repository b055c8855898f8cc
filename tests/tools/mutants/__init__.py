"""Bugs to plant: each must make a test fail. tests/tools/test_mutants*.py plant them in a copy.

A mutant replaces one piece of text, which occurs exactly once in its file, and names the test that
must notice. There are one or two for each class of bugs, and some in every kernel and folder of the
package. Quick ones are planted in every run, the others with --full. Two kinds are left out,
because no test here can notice them: changes without an effect (a second mask), and changes that
matter only on a GPU (a barrier, a fused multiply-add).
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    killed_by: str
    quick: bool = False
