"""What `python -m benchmarks` measures: a module a section, whose `rows` yields its comparisons."""

# minutes that a section takes on two quiet CPU cores
SECTIONS = {
    "training": 7.5,
    "inference": 5.5,
    "memory": 1.2,
    "classes": 3.0,
    "data": 1.0,
    "evaluation": 1.0,
    "startup": 0.8,
    "attention": 0.5,
}
ON_GPU = ("attention",)  # measured by default on a GPU alone
