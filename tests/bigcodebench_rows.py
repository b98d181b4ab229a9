"""Rows of our own in BigCodeBench's schema: packages, a patched world, names that tests borrow from the prompt."""

from __future__ import annotations

from typing import Any

_TOLD = {"instruct_prompt": "Do it.", "code_prompt": "def task_func():", "doc_struct": "{}", "libs": "['numpy']"}
BIGCODEBENCH_ROWS: tuple[dict[str, Any], ...] = (
    {
        **_TOLD,
        "task_id": "BigCodeBench/0",
        "complete_prompt": 'import numpy as np\nSCALE = 2\n\ndef task_func(values):\n    """Scale the values."""',
        "canonical_solution": "    return np.asarray(values) * SCALE\n",
        "entry_point": "task_func",
        "test": "import unittest\n"
        "class TestCases(unittest.TestCase):\n"
        "    def test_array(self):\n"
        "        self.assertTrue(np.array_equal(task_func([1, 2]), np.array([1, 2]) * SCALE))\n"
        "    def test_type(self):\n"
        "        self.assertIsInstance(task_func([1]), np.ndarray)\n",
    },
    {
        **_TOLD,
        "task_id": "BigCodeBench/1",
        "complete_prompt": 'import json\nimport os\n\ndef task_func(path):\n    """Read a JSON file that exists."""',
        "canonical_solution": "    if not os.path.exists(path):\n"
        "        raise FileNotFoundError(path)\n"
        "    with open(path) as file:\n"
        "        return json.load(file)\n",
        "entry_point": "task_func",
        "test": "import unittest\n"
        "from unittest.mock import mock_open, patch\n"
        "class TestCases(unittest.TestCase):\n"
        "    @patch('os.path.exists', return_value=True)\n"
        "    def test_read(self, exists):\n"
        "        with patch('builtins.open', mock_open(read_data='{\"a\": 1}')):\n"
        "            self.assertEqual(task_func('a.json'), {'a': 1})\n"
        "    def test_missing(self):\n"
        "        with self.assertRaises(FileNotFoundError):\n"
        "            task_func('/nowhere.json')\n",
    },
    {
        **_TOLD,
        "task_id": "BigCodeBench/2",
        "complete_prompt": 'from collections import Counter\n\ndef task_func(words):\n    """Count the words."""',
        "canonical_solution": "    return dict(Counter(words))\n",
        "entry_point": "task_func",
        "test": "import unittest\n"
        "class TestCases(unittest.TestCase):\n"
        "    def test_count(self):\n"
        "        self.assertEqual(task_func(['a', 'b', 'a']), {'a': 2, 'b': 1})\n",
    },
)
