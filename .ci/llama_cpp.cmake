# Read when llama.cpp's project begins: its Python package asks for the common library, which takes
# as long to compile as all the rest and which the package does not load.
set(LLAMA_BUILD_COMMON OFF)
