// How a product is cut into tasks: every task is one panel of columns times a range of row panels.
#pragma once

#include <algorithm>

#include "common/types.h"

namespace qk {

class Split {
 public:
  // Rows are split only when there are too few column panels to balance the threads: each further split of the rows
  // packs every column panel once more. At least 4 row panels stay together to pay for that.
  Split(int64_t row_panels, int64_t column_panels, int threads)
      : row_panels_(row_panels), column_panels_(column_panels) {
    const int64_t wanted = threads > 1 ? div_up(4 * threads, std::max<int64_t>(column_panels, 1)) : 1;
    row_splits_ = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(row_panels / 4, 1));
  }

  int64_t tasks() const { return row_panels_ > 0 ? column_panels_ * row_splits_ : 0; }
  int64_t column(int64_t task) const { return task / row_splits_; }
  int64_t max_rows() const { return div_up(row_panels_, row_splits_); }  // panels of a task
  int64_t row_begin(int64_t task) const { return task % row_splits_ * row_panels_ / row_splits_; }
  int64_t row_end(int64_t task) const { return (task % row_splits_ + 1) * row_panels_ / row_splits_; }

 private:
  int64_t row_panels_, column_panels_, row_splits_;
};

}  // namespace qk
