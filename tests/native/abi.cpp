// Each object file was compiled for the instruction set that this one was compiled for.
#include <cstring>

extern "C" const char* fs_isa(void);

int main() {
    return std::strcmp(fs_isa(), FS_ISA) != 0;
}
