"""
The things of the embedded world: how each is drawn, in which colors, and what COCO calls it.

A thing is a list of strokes on a 16x16 sheet, (shape, ink, coordinates). Ink C is the object's color, D
dark, W white, and "hole" erases what is below. Tables only; scene.py draws them.
"""

THINGS = {
    "bottle": [("box", "C", 6, 1, 10, 6), ("box", "C", 4, 5.5, 12, 16), ("box", "D", 6, 0, 10, 2),
               ("box", "W", 4, 9, 12, 12.5)],
    "bus": [("box", "C", 0, 3, 16, 13), ("box", "W", 1.5, 5, 5, 8.5), ("box", "W", 6.5, 5, 10, 8.5),
            ("box", "W", 11.5, 5, 15, 8.5), ("oval", "D", 2, 11, 6, 15.5), ("oval", "D", 10, 11, 14, 15.5)],
    "tv": [("line", "D", 4, 0, 8, 4, 12, 0), ("box", "C", 0, 3.5, 16, 14), ("box", "W", 2, 5.5, 11.5, 12),
           ("oval", "D", 12.5, 6, 14.5, 8), ("line", "D", 3, 15.4, 13, 15.4)],
    "apple": [("oval", "C", 1, 4, 9.5, 15.5), ("oval", "C", 6.5, 4, 15, 15.5), ("line", "D", 8, 5.5, 8.5, 0.5),
              ("oval", "D", 8.5, 0.5, 12.5, 3)],
    "boat": [("polygon", "C", 0, 10.5, 16, 10.5, 12.5, 15.5, 3.5, 15.5), ("line", "D", 7, 0, 7, 10.5),
             ("polygon", "C", 8, 1, 14.5, 9, 8, 9)],
    "cup": [("oval", "C", 8, 5, 16, 13), ("oval", "hole", 10, 7, 14, 11),
            ("polygon", "C", 1, 3, 12, 3, 10.5, 15.5, 2.5, 15.5), ("line", "D", 2, 4, 11, 4)],
    "traffic light": [("box", "C", 4, 0, 12, 16), ("oval", "W", 6, 1, 10, 5), ("oval", "W", 6, 6, 10, 10),
                      ("oval", "D", 6, 11, 10, 15)],
    "chair": [("box", "C", 2.5, 0, 5, 16), ("box", "C", 2.5, 7.5, 13.5, 10.5), ("box", "C", 11, 10, 13.5, 16),
              ("line", "D", 3, 2, 5, 2)],
    "banana": [("polygon", "C", 1, 3, 3.5, 2, 5, 7, 9, 10, 15, 10, 16, 12, 11, 14.5, 5, 13.5, 2, 9),
               ("line", "D", 1.5, 3, 3.5, 2), ("line", "D", 15, 10, 16, 12)],
    "kite": [("polygon", "C", 8, 0, 14, 5.5, 8, 12, 2, 5.5), ("line", "D", 2, 5.5, 14, 5.5),
             ("line", "C", 8, 12, 11, 13, 6, 14.5, 10, 16)],
    "clock": [("oval", "C", 0, 0, 16, 16), ("oval", "W", 2.5, 2.5, 13.5, 13.5),
              ("line", "D", 8, 4, 8, 8, 11.5, 9.5)],
    "umbrella": [("arch", "C", 0, 1, 16, 17), ("line", "D", 8, 9, 8, 14, 10, 15.4, 11.5, 14),
                 ("line", "D", 8, 0, 8, 2)],
    "stop sign": [("line", "D", 8, 11, 8, 16),
                  ("polygon", "C", 5, 0, 11, 0, 14, 3, 14, 9, 11, 12, 5, 12, 2, 9, 2, 3),
                  ("box", "W", 4, 4.5, 12, 7.5)],
    "ball": [("oval", "C", 1.5, 1.5, 14.5, 14.5), ("line", "W", 8, 2, 6.5, 5, 6.5, 11, 8, 14),
             ("line", "W", 2, 8, 14, 8)],
    "book": [("polygon", "C", 0, 3, 7.5, 5, 7.5, 15, 0, 13), ("polygon", "C", 16, 3, 8.5, 5, 8.5, 15, 16, 13),
             ("line", "W", 1.5, 6.5, 6, 7.7), ("line", "W", 10, 7.7, 14.5, 6.5), ("line", "W", 1.5, 9.5, 6, 10.7),
             ("line", "W", 10, 10.7, 14.5, 9.5)],
    "donut": [("oval", "C", 0.5, 2, 15.5, 15), ("oval", "hole", 5.5, 6.5, 10.5, 10.5), ("line", "D", 3, 7, 4, 9),
              ("line", "D", 11, 5, 12.5, 6), ("line", "D", 10, 12.5, 11.5, 11.5)],
}

# A label is a framed digit of seven segments.
LABEL_FRAME = [("box", "D", 1, 0, 15, 16), ("box", "W", 2, 1, 14, 15)]
SEGMENTS = {"a": (5, 3, 11, 3), "b": (11, 3, 11, 8), "c": (11, 8, 11, 13), "d": (5, 13, 11, 13),
            "e": (5, 8, 5, 13), "f": (5, 3, 5, 8), "g": (5, 8, 11, 8)}
DIGITS = ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"]

COLORS = {"red": (214, 40, 40), "green": (34, 139, 60), "blue": (40, 80, 210),
          "yellow": (240, 196, 20), "purple": (140, 50, 170), "black": (38, 38, 42)}
UNSEEN_COLORS = {"red": (190, 66, 84), "green": (78, 150, 72), "blue": (62, 110, 190),
                 "yellow": (212, 176, 56), "purple": (128, 72, 150), "black": (66, 66, 66)}
DARK, WHITE = (60, 52, 52), (250, 250, 250)

COCO_IDS = {"bottle": 44, "bus": 6, "tv": 72, "apple": 53, "boat": 9, "cup": 47, "traffic light": 10, "chair": 62,
            "banana": 52, "kite": 38, "clock": 85, "umbrella": 28, "stop sign": 13, "ball": 37, "book": 84,
            "donut": 60}
COCO_NAMES = {"ball": "sports ball"}     # our word -> COCO's category, where the two differ
