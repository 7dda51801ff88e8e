"""Runs generated programs as hostile code; Linux on x86-64 and 64-bit Arm, refused elsewhere.

Who runs what. The evaluator starts one small interpreter per worker (`zygote`), without site-packages and with a
scrubbed environment. Per program that forks a supervisor, and the supervisor two processes, both confined alike: one
runs the program, the other the tests (`roles`). The tests call the program's function through a pipe that carries plain
values only (`values`), so the program sees the arguments of its calls, never the tests, the expected values or the
verdict: the checker has sent `passed` itself, after the last of its own assertions. `os._exit(0)`, a marker that is
printed, a patched `assert`, an object that equals everything, a search of the heap or of the open files all end as a
failed test. Nothing survives into the next program.

What holds under either isolation, by a seccomp filter that lets through a list of harmless system calls alone, and by
resource limits: one process of one thread (fork, exec and threads are refused), no sockets but pairs of its own, no
signals to others, no tracing, no change of modes, owners or times of files, no memory or queues shared with others;
bounded time (wall and processor), memory, size and number of open files; killed by the supervisor, which waits for the
end of both processes before it reports. All three die with the evaluator's worker.

What differs, see `Sandbox.isolation`:
- "namespaces" (as root, or as anyone where user namespaces are allowed): the program sees a read-only root of its own
  with the standard library, the C libraries and numpy, no site-packages, no /proc, /dev, /tmp or home, no network and
  no other process; its working directory is a small tmpfs that vanishes with it.
- "landlock" (a kernel with Landlock, where namespaces are refused, as in most containers): the same files can be read
  and nothing can be written, the empty working directory included. Not hidden: whether a file exists, its size and
  times, and where a symbolic link leads; the list of processes cannot be read.

What is not prevented: faults of the kernel itself, the load of the processor for the time allowed, and programs that
guess the expected values from the arguments. A value that is not plain data (see `values`) equals nothing, so a test
that wants an object of the program's own class fails; a test that passes such an object ends the evaluation with an
error instead of a wrong score.
"""
