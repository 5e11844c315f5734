namespace qk { __attribute__((visibility("default"))) int placeholder_for_build() { return 0; } }
