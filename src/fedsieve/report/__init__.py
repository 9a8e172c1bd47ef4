"""One page about one or several runs: what they reached, what they sent, and how they were set.

The page is a single file that opens offline: nothing is fetched, and its only script sorts tables (its own policy
forbids all else), plots inline. It is made from run directories alone, finished or not, and holds no date of its own:
the same runs, the same bytes. Runs that differ in nothing but their seed are one line of it, wherever they stand.
"""

from fedsieve.report.page import report

__all__ = ["report"]
