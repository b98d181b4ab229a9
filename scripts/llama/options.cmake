# Included right after project(): upstream forces this cache entry on, and only a plain variable wins over it.
# The helper library behind it serves upstream's command-line tools, which we do not build.
set(LLAMA_BUILD_COMMON OFF)
