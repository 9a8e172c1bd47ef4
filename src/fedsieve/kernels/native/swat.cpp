#include "vec.h"
void keep(const Keep&, int, int) {}
void wide(const Wide&, int, int) {}
