/*
** check.h: what every fuzz target checks, whatever it parses.  An action opens something, uses it and puts everything back; check_action runs it and ends the
** process (abort, so that the fuzzer keeps the input) when a promise is broken: an error without a kind or a printable message, memory that is not given
** back, an index that lies, more memory at open than the file allows, or a failed allocation that is not told as one.
** It refuses nothing: every input is a good input.  Callers: the targets beside it.
*/
#ifndef CHECK_H
#define CHECK_H
#include <stddef.h>
#include <stdint.h>
#include "../../csrc/base/err.h"
#include "../../csrc/base/mem.h"
#include "../../csrc/file/file.h"

/* Ends the process with the place and a sentence. */
#define CHECK(cond, ...) do { if (!(cond)) check_broken(__FILE__, __LINE__, #cond, __VA_ARGS__); } while (0)
_Noreturn void check_broken(const char *file, int line, const char *cond, const char *fmt, ...) __attribute__((format(printf, 4, 5)));

typedef struct { const uint8_t *p; size_t n; const ap_container *kind; const char *config; size_t config_n; } check_input;
typedef int (*check_fn)(const check_input *in, ap_err *e);

/* Runs the action, then, for some inputs, runs it again with one allocation failing.  CHECK_SWEEP=1 in the environment: for all inputs, each allocation. */
void check_action(check_fn fn, const check_input *in);

const ap_container *check_container(const char *name);           /* NULL when it is not built in                                   */
int  check_open(ap_file **f, const check_input *in, ap_err *e);  /* opens, holds the peak of memory against the size of the input    */
int  check_file(const ap_file *f, ap_err *e);                    /* every tensor and key of an opened file is what file.h says       */
#endif
