"""Models as pure functions over parameter trees."""
