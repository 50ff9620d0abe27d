"""`moeweave-bench`: communication microbenchmarks, checked before they are timed."""
