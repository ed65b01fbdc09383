"""Recipes that people start from, one YAML file each. See docs/concepts/recipe.md."""
