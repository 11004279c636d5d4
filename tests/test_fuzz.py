"""The short form of fuzz_readers.py."""

import fuzz_readers
import pytest


@pytest.mark.filterwarnings("ignore")  # zipfile's remarks on doubled names
@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_a_damaged_file_is_refused_in_one_line_or_read_and_takes_no_memory(reader):
    seen = fuzz_readers.fuzz(reader, 200)
    assert seen["refused"] > 50 and seen["refused"] + seen["read"] == 200
