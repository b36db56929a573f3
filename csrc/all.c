/*
** all.c: the whole core in one translation unit, in floor order.  It is the reading list, and one of the builds under test: file-local names are unique
** and every row macro is undefined after its file, or this does not compile.
*/
#define AP_PY_MODULE_C
#include "py/py.h"          /* Python.h wants to be first */
/* 0 base: errors, sizes, cursor, JSON, memory, threads, tiers */
#include "base/err.c"
#include "base/mem.c"
#include "base/cursor.c"
#include "base/json.c"
#include "base/tiers.c"
#include "base/threads.c"
/* 1 quant: what the bits of a block mean */
#include "quant/plain.c"
#include "quant/q4_0.c"
#include "quant/q4_1.c"
#include "quant/q5_0.c"
#include "quant/q5_1.c"
#include "quant/q8_0.c"
#include "quant/q8_1.c"
#include "quant/q2_k.c"
#include "quant/q3_k.c"
#include "quant/q4_k.c"
#include "quant/q5_k.c"
#include "quant/q6_k.c"
#include "quant/q8_k.c"
#include "quant/iq4_nl.c"
#include "quant/iq4_xs.c"
#include "quant/mxfp4.c"
#include "quant/apr_q4.c"
#include "quant/apr_q8.c"
#include "quant/formats.c"
/* 2 file: containers */
#include "file/file.c"
#include "file/gguf.c"
#include "file/safetensors.c"
/* 3 plan: the tables; file -> model -> plan */
#include "plan/tables.c"
#include "plan/model.c"
#include "plan/plan.c"
/* 4 cpu: the operations */
#include "cpu/lanes.c"
#include "cpu/cpu.c"
#include "cpu/matmul.c"
#include "cpu/norm.c"
#include "cpu/rope.c"
#include "cpu/attention.c"
#include "cpu/elementwise.c"
/* 5 run: the step loop */
#include "run/run.c"
/* 6 py: the binding */
#include "py/tables.c"
#include "py/errors.c"
#include "py/file.c"
#include "py/quant.c"
#include "py/model.c"
#include "py/run.c"
#include "py/module.c"
