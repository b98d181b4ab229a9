# Included right after project() of llama-cpp-python, whose sources stay untouched.

# Upstream forces this cache entry on, and only a plain variable wins over it. It is the helper library of upstream's
# command-line tools, which are not built.
set(LLAMA_BUILD_COMMON OFF)

# Every GCC on x86 takes the header: correct where GCC is, needed where GCC 12 is not, empty where AMX is off.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_compile_options("SHELL:-include \"${CMAKE_CURRENT_LIST_DIR}/amx_tile.h\"")
endif()

# Kernels of ours join upstream's in the library that computes; the target exists once all folders are read.
cmake_language(EVAL CODE "cmake_language(DEFER CALL target_sources ggml-cpu PRIVATE [[${CMAKE_CURRENT_LIST_DIR}/row_kernels.cpp]])")
