"""Judges for the sandbox's tests; imported in the child process."""

import os
import time


def judge(request):
    match request["do"]:
        case "echo":
            print("noise")
            return request["value"]
        case "hang":
            time.sleep(600)
        case "raise":
            raise ValueError("no")
        case "exit":
            raise SystemExit(3)
        case "die":
            os._exit(1)
        case "write":
            with open(request["path"], "w") as stream:
                stream.write("x" * 100)
        case "allocate":
            return len(bytearray(16 * 1024**3))
    return None
