/*
** use.h: what a person does with a file after it is open, with limits that keep it fast: bind, plan, two forward passes on one thread, an edited plan.
** Callers: target_bind.c and target_config.c, as the end of their actions.
*/
#ifndef USE_H
#define USE_H
#include "check.h"
int use_file(const ap_file *f, ap_err *e);
#endif
