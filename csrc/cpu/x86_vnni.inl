// What the VNNI files share: sums are int32 from the start, the lanes are taken as they stand.

constexpr int64_t kSplitChunk = int64_t{1} << 20;
constexpr int64_t kPanelChunk = int64_t{1} << 20;
constexpr int kLaneShift[4] = {0, 2, 4, 6};
constexpr uint32_t kInt8Offset = 128;
constexpr uint32_t kScaledOffset = 128;
