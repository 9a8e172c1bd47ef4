extern "C" const char* fs_isa(void) { return FS_ISA; }
extern "C" int fs_abi(void) { return 1; }
