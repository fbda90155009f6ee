// A vector whose new elements hold anything until they are written: to make room costs nothing.
#pragma once

#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace retrieval {

template <typename T>
struct Unwritten : std::allocator<T> {
  template <typename Other>
  struct rebind {
    using other = Unwritten<Other>;
  };
  template <typename Element>
  void construct(Element* place) {
    ::new (static_cast<void*>(place)) Element;
  }
  template <typename Element, typename... Args>
  void construct(Element* place, Args&&... args) {
    ::new (static_cast<void*>(place)) Element(std::forward<Args>(args)...);
  }
};

template <typename T>
using List = std::vector<T, Unwritten<T>>;

}  // namespace retrieval
